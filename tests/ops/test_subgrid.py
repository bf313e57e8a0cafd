"""Sub-grids of rows x columns: products, gradients and merges against float64 autograd over the dense weight."""

import pytest
import torch

from hf_sparse_peft.ops import (
    DenseSource,
    DequantizedSource,
    Plan,
    add_subgrid_,
    put_columns_,
    read_subgrid,
    register_owner,
    sparse_linear,
    sparse_linear_node,
    take_columns,
    write_subgrid_,
)

ROWS, COLS, RANK = 24, 40, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
SIDES = {"some": (7, 11), "one entry": (1, 1), "all rows": (ROWS, 5), "all columns": (5, COLS), "all": (ROWS, COLS)}


def problem(sides=(7, 11), rank=0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    grid = [
        torch.randperm(n, generator=generator)[:k].sort().values.int() for n, k in zip((ROWS, COLS), sides, strict=True)
    ]
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {"x": randn(2, 6, COLS).to(dtype), "values": randn(*sides).to(wide), "bias": randn(ROWS).to(dtype)}
    if rank:
        tensors |= {"A": randn(rank, COLS).to(wide), "B": randn(ROWS, rank).to(wide), "gate": randn(rank).to(wide)}
    return tensors, grid, randn(ROWS, COLS).to(dtype), randn(2, 6, ROWS).to(dtype)


def reference(tensors, grid, weight, grad, scale):
    t = {name: tensor.double().clone().requires_grad_() for name, tensor in tensors.items()}
    one_hot = [torch.eye(n, dtype=torch.float64)[side.long()] for n, side in zip((ROWS, COLS), grid, strict=True)]
    effective = weight.double() + one_hot[0].t() @ t["values"] @ one_hot[1]
    if "A" in t:
        effective = effective + scale * t["B"] @ torch.diag(t["gate"]) @ t["A"]
    y = t["x"] @ effective.t() + t["bias"]
    y.backward(grad.double())
    return y.detach(), {name: tensor.grad for name, tensor in t.items()}


def source_of(kind, weight):
    if kind == "dense":
        return DenseSource(weight)
    if kind == "transposed":
        return DenseSource(weight.t().contiguous(), transposed=True)
    return DequantizedSource(lambda dtype: weight.to(dtype, copy=True)) if kind == "dequantized" else None


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def leaves_of(tensors):
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def run(leaves, grid, plan, **more):
    tensors = {name: leaf for name, leaf in leaves.items() if name != "x"} | more
    return sparse_linear(leaves["x"], plan, live_rows=grid[0], live_columns=grid[1], **tensors)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["dense", "transposed", "dequantized", "update alone"])
@pytest.mark.parametrize("rank", [0, RANK])
def test_output_and_every_gradient_match_the_dense_equation(rank, kind, dtype):
    tensors, grid, weight, grad = problem(rank=rank, dtype=dtype)
    weight = torch.zeros_like(weight) if kind == "update alone" else weight
    if kind == "update alone":
        tensors["bias"].zero_()
    expected, expected_grads = reference(tensors, grid, weight, grad, scale=0.5)
    leaves = leaves_of(tensors)
    plan = Plan(ROWS, COLS, dtype, source_of(kind, weight), "subnet", scale=0.5)
    y = run(leaves, grid, plan, **({"bias": None} if kind == "update alone" else {}))
    y.backward(grad)
    assert relative(y, expected) < TOLERANCE[dtype]
    for name, leaf in leaves.items():
        if name == "bias" and kind == "update alone":
            continue
        assert leaf.grad.dtype == leaf.dtype
        assert relative(leaf.grad, expected_grads[name]) < TOLERANCE[dtype], name


@pytest.mark.parametrize("sides", list(SIDES.values()), ids=list(SIDES))
def test_every_shape_of_a_subgrid_matches_the_dense_equation(sides):
    tensors, grid, weight, grad = problem(sides, dtype=torch.float64)
    expected, expected_grads = reference(tensors, grid, weight, grad, 1.0)
    leaves = leaves_of(tensors)
    y = run(leaves, grid, Plan(ROWS, COLS, torch.float64, DenseSource(weight), "subnet"))
    y.backward(grad)
    torch.testing.assert_close(y, expected)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected_grads[name], msg=name)


def kept_inputs(leaves, grid, plan, **more):
    kept = []
    own = {leaf.untyped_storage().data_ptr() for name, leaf in leaves.items() if name != "x"}
    own |= {side.untyped_storage().data_ptr() for side in grid}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(leaves, grid, plan, **more)
    return [t for t in kept if t is not None and t.untyped_storage().data_ptr() not in own]


def test_only_the_columns_of_the_input_are_kept():
    tensors, grid, weight, _ = problem()
    plan = Plan(ROWS, COLS, torch.float32, DenseSource(weight), "subnet")
    kept = kept_inputs(leaves_of(tensors), grid, plan)
    assert [tuple(t.shape) for t in kept] == [(12, 11)]
    assert kept[0].untyped_storage().nbytes() == 12 * 11 * 4


@pytest.mark.parametrize("who", ["a low-rank half", "a reader"])
def test_the_whole_input_is_kept_where_somebody_needs_it(who):
    tensors, grid, weight, _ = problem(rank=RANK if who == "a low-rank half" else 0)
    reader = [].append if who == "a reader" else None
    plan = Plan(ROWS, COLS, torch.float32, DenseSource(weight), "subnet", gradient_reader=reader)
    assert [tuple(t.shape) for t in kept_inputs(leaves_of(tensors), grid, plan)] == [(2, 6, COLS)]


class Wanting:
    def __init__(self, wanted):
        self.wanted, self.taken = wanted, []

    def wanted_units(self):
        return self.wanted

    def take(self, gradient):
        self.taken.append(gradient.clone())

    def __call__(self, dense):
        self.taken.append(dense.clone())


@pytest.mark.parametrize("needs_values", [True, False])
@pytest.mark.parametrize("wanted", [None, [0, 41, ROWS * COLS - 1]], ids=["dense", "entries of the whole weight"])
def test_readers_see_gradients_outside_of_the_subgrid(wanted, needs_values):
    tensors, grid, weight, grad = problem(dtype=torch.float64)
    dense = torch.einsum("abr,abc->rc", grad, tensors["x"])
    reader = Wanting(None if wanted is None else torch.tensor(wanted))
    watched = []
    plan = Plan(
        ROWS, COLS, torch.float64, DenseSource(weight), "subnet",
        gradient_reader=reader, passive_reader=lambda g: watched.append(g.clone()),
    )  # fmt: skip
    leaves = leaves_of(tensors)
    leaves["values"].requires_grad_(needs_values)
    run(leaves, grid, plan).backward(grad)
    torch.testing.assert_close(reader.taken, [dense if wanted is None else dense.flatten()[wanted]])
    torch.testing.assert_close(watched, [dense])
    if needs_values:
        torch.testing.assert_close(leaves["values"].grad, dense[grid[0].long()][:, grid[1].long()])


def test_values_below_the_grid_of_bf16_weights_reach_output_and_input_gradient():
    tensors, grid, _, grad = problem(dtype=torch.bfloat16)
    weight = torch.full((ROWS, COLS), 32.0).bfloat16()
    weight[:, 1::2], weight[1::2] = -32.0, -weight[::2]  # pairs that cancel: what is left is the update's
    x, grad = tensors["x"].clone(), grad.clone()
    x[..., 1::2], grad[..., 1::2] = x[..., ::2], grad[..., ::2]
    weight[1::2] = -weight[::2]
    leaves = leaves_of(tensors | {"x": x, "values": 1e-4 * tensors["values"], "bias": torch.zeros(ROWS)})
    y = run(leaves, grid, Plan(ROWS, COLS, torch.bfloat16, DenseSource(weight), "subnet"))
    y.backward(grad)
    delta = torch.zeros(ROWS, COLS, dtype=torch.float64)
    delta[grid[0].long()[:, None], grid[1].long()] = leaves["values"].detach().double()
    assert relative(y, x.double() @ delta.t()) < 1e-2
    assert relative(leaves["x"].grad, grad.double() @ delta) < 1e-2


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adding_rounds_once_and_writing_back_restores_every_bit(dtype, transposed):
    tensors, (rows, columns), weight, _ = problem(dtype=dtype)
    weight = weight.t().contiguous().t() if transposed else weight
    original, values = weight.clone(), 0.01 * tensors["values"]
    before = add_subgrid_(weight, rows, columns, values)
    inside = torch.zeros(ROWS, COLS, dtype=torch.bool)
    for r in rows.tolist():
        inside[r, columns.long()] = True
    wanted = (original[inside].double() + values.flatten().double()).float().to(dtype)
    assert torch.equal(weight[inside], wanted)
    assert torch.equal(weight[~inside], original[~inside])
    assert torch.equal(read_subgrid(weight, rows, columns).flatten(), wanted)
    assert torch.equal(write_subgrid_(weight, rows, columns, before), original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["rows", "transposed", "part of a wider matrix"])
def test_columns_are_taken_and_put_on_any_layout(layout, dtype):
    x = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = {"rows": x, "transposed": x.t().contiguous().t(), "part of a wider matrix": x.repeat(1, 2)[:, 10:30]}[layout]
    columns = torch.tensor([0, 3, 19], dtype=torch.int32)
    expected = torch.stack([x[:, 0], x[:, 3], x[:, 19]], 1)
    taken = take_columns(x, columns)
    assert torch.equal(taken, expected)
    y = x.clone(memory_format=torch.preserve_format)
    put_columns_(y, columns, taken.flip(1))
    assert torch.equal(y[:, [0, 3, 19]], expected.flip(1))
    others = [i for i in range(20) if i not in (0, 3, 19)]
    assert torch.equal(y[:, others], x[:, others])


class Owner:
    def __init__(self, source=None, reader=None):
        self.source, self.reader = source, reader

    def runtime_source(self):
        return self.source

    def runtime_reader(self):
        return self.reader


@pytest.mark.parametrize("kind", ["dense", "transposed", "dequantized"])
@pytest.mark.parametrize("rank", [0, RANK])
def test_the_compiled_node_is_one_graph_with_the_eager_numbers(rank, kind):
    tensors, grid, weight, grad = problem(rank=rank)
    source = source_of(kind, weight)
    seen = []
    owner = Owner(source, seen.append if kind == "transposed" else None)
    number = register_owner(owner)
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def node(x, values, bias, A=None, B=None, gate=None):
        weight = {} if kind == "dequantized" else {"weight": source.weight, "transposed": source.transposed}
        return sparse_linear_node(
            x, number, ROWS, **weight, dequantized=kind == "dequantized", values=values, bias=bias, A=A, B=B, gate=gate,
            live_rows=grid[0], live_columns=grid[1], granularity="subnet", scale=0.5, may_read=kind == "transposed",
        )  # fmt: skip

    compiled, eager = leaves_of(tensors), leaves_of(tensors)
    y = node(**compiled)
    y.backward(grad)
    expected = run(eager, grid, Plan(ROWS, COLS, torch.float32, source, "subnet", scale=0.5))
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    for name in tensors:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad, msg=name)
    if kind == "transposed":
        torch.testing.assert_close(seen, [torch.einsum("abr,abc->rc", grad, tensors["x"])])


def test_a_compiled_node_keeps_only_the_columns_of_its_input():
    tensors, grid, weight, _ = problem()
    number = register_owner(owner := Owner())
    kept = []
    leaves = leaves_of(tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sparse_linear_node(
            leaves["x"], number, ROWS, weight=weight, values=leaves["values"], bias=leaves["bias"],
            live_rows=grid[0], live_columns=grid[1], granularity="subnet",
        )  # fmt: skip
    assert owner is not None
    assert [t.shape for t in kept if t is not None and t.shape[-1] == COLS and t.shape[0] != ROWS] == []
