"""The product and its gradients against a dense float64 reference written from the equation."""

import zlib

import pytest
import torch

from hf_sparse_peft.ops import (
    DenseSource,
    DequantizedSource,
    Plan,
    register_owner,
    sparse_linear,
    sparse_linear_node,
)

ROWS, COLS, BLOCK, RANK, TOKENS = 48, 32, 8, 4, 10
UNIT_COUNT = {"entry": ROWS * COLS, "block": (ROWS // BLOCK) * (COLS // BLOCK), "row": ROWS, "column": COLS}


def values_shape(granularity, k):
    return {"entry": (k,), "block": (k, BLOCK, BLOCK), "row": (k, COLS), "column": (k, ROWS)}[granularity]


def positions(granularity, units):
    """Flat positions of every value, by counting, not by the code under test."""
    grid = torch.arange(ROWS * COLS).reshape(ROWS, COLS)
    if granularity == "entry":
        return grid.reshape(-1)[units]
    if granularity == "row":
        return grid[units]
    if granularity == "column":
        return grid[:, units].t()
    blocks = [grid[r : r + BLOCK, c : c + BLOCK] for r in range(0, ROWS, BLOCK) for c in range(0, COLS, BLOCK)]
    return torch.stack(blocks)[units]


def draw(granularity, rank, dtype, seed, k=3):
    gen = torch.Generator().manual_seed(seed)
    units = torch.randperm(UNIT_COUNT[granularity], generator=gen)[:k].sort().values.int()

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    tensors = {
        "x": randn(2, TOKENS // 2, COLS).to(dtype),
        "values": randn(*values_shape(granularity, k)).float(),
        "bias": randn(ROWS).to(dtype),
    }
    if rank:
        tensors |= {"A": randn(rank, COLS).float(), "B": randn(ROWS, rank).float(), "gate": randn(rank).float()}
    weight = randn(ROWS, COLS).to(dtype)
    grad = randn(2, TOKENS // 2, ROWS).to(dtype)
    return tensors, units, weight, grad


def dense_reference(tensors, units, weight, grad, granularity, scale):
    t = {name: tensor.double().clone().requires_grad_() for name, tensor in tensors.items()}
    delta = torch.zeros(ROWS * COLS, dtype=torch.float64)
    delta = delta.index_put((positions(granularity, units.long()).reshape(-1),), t["values"].reshape(-1))
    effective = weight.double() + delta.reshape(ROWS, COLS)
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
    if kind == "dequantized":
        return DequantizedSource(lambda dtype: weight.to(dtype, copy=True))
    return None


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("kind", ["dense", "transposed", "dequantized", "product"])
@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("granularity", list(UNIT_COUNT))
def test_output_and_every_gradient_match_the_dense_equation(granularity, rank, kind, dtype):
    seed = zlib.crc32(f"{granularity} {rank} {kind} {dtype}".encode())
    tensors, units, weight, grad = draw(granularity, rank, dtype, seed)
    if dtype == torch.float64:
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
    expected, expected_grads = dense_reference(tensors, units, weight, grad, granularity, scale=0.5)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    plan = Plan(ROWS, COLS, dtype, source_of(kind, weight), granularity, BLOCK, scale=0.5)
    arguments = {name: tensor for name, tensor in leaves.items() if name != "x"}
    if kind == "product":
        bias = arguments.pop("bias")
        y = sparse_linear(leaves["x"], plan, units=units, **arguments)
        y = y + torch.nn.functional.linear(leaves["x"], weight, bias)
    else:
        y = sparse_linear(leaves["x"], plan, units=units, **arguments)
    y.backward(grad)
    assert relative(y, expected) < TOLERANCE[dtype], f"output, seed {seed}"
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == leaf.dtype
        assert relative(leaf.grad, expected_grads[name]) < TOLERANCE[dtype], f"gradient of {name}, seed {seed}"


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("granularity", list(UNIT_COUNT))
def test_nothing_of_the_size_of_a_weight_is_kept_for_backward(granularity):
    tensors, units, weight, _ = draw(granularity, RANK, torch.bfloat16, 0)
    kept = []
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()} | {units.untyped_storage().data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        plan = Plan(ROWS, COLS, torch.bfloat16, DenseSource(weight), granularity, BLOCK)
        sparse_linear(leaves["x"], plan, units=units, **{n: t for n, t in leaves.items() if n != "x"})
    assert not [t.shape for t in kept if t is not None and t.untyped_storage().data_ptr() not in own]


def test_columns_keep_only_their_slice_of_the_input():
    tensors, units, weight, _ = draw("column", 0, torch.float32, 0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        plan = Plan(ROWS, COLS, torch.float32, DenseSource(weight), "column")
        sparse_linear(tensors["x"].requires_grad_(), plan, units=units, values=tensors["values"].requires_grad_())
    inputs = [t for t in kept if t.dtype == torch.float32 and t.shape[0] == TOKENS]
    assert [tuple(t.shape) for t in inputs] == [(TOKENS, 3)]


def test_a_gradient_reader_sees_the_dense_gradient_and_values_agree_with_it():
    tensors, units, weight, grad = draw("entry", 0, torch.float32, 0)
    seen = []
    values = tensors["values"].requires_grad_()
    plan = Plan(ROWS, COLS, torch.float32, DenseSource(weight), gradient_reader=seen.append)
    sparse_linear(tensors["x"], plan, values=values, units=units).backward(grad)
    expected = torch.einsum("abr,abc->rc", grad.double(), tensors["x"].double())
    assert relative(seen[0], expected) < 1e-5
    assert torch.equal(values.grad, seen[0].reshape(-1)[units.long()])


def test_layers_fed_the_same_fp32_input_keep_one_bf16_copy_of_it():
    tensors, units, weight, _ = draw("entry", 0, torch.bfloat16, 0)
    x = tensors["x"].float().requires_grad_()
    kept = []
    plan = Plan(ROWS, COLS, torch.bfloat16, DenseSource(weight))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = [sparse_linear(x, plan, units=units, values=tensors["values"].requires_grad_()) for _ in range(3)]
    copies = {t.data_ptr() for t in kept if t is not None and t.shape == x.shape}
    assert len(copies) == 1
    sum(y.float().sum() for y in outputs).backward()
    x.data.mul_(2)
    with torch.no_grad():
        x.add_(1)  # a new version is a new input
    assert not torch.equal(sparse_linear(x, plan), sparse_linear(tensors["x"], plan))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("granularity", UNIT_COUNT)
def test_a_support_without_units_leaves_the_base_and_has_empty_gradients(granularity, compiled):
    tensors, units, weight, grad = draw(granularity, 0, torch.bfloat16, 0, k=0)
    x, values = tensors["x"].requires_grad_(), tensors["values"].requires_grad_()
    cut = {"granularity": granularity, "block_size": BLOCK}
    if compiled:
        owner = Owner()
        y = sparse_linear_node(
            x, register_owner(owner), ROWS, weight=weight, values=values, units=units, bias=tensors["bias"], **cut
        )
    else:
        plan = Plan(ROWS, COLS, torch.bfloat16, DenseSource(weight), **cut)
        y = sparse_linear(x, plan, values=values, units=units, bias=tensors["bias"])
    y.backward(grad)
    assert relative(y, x.double() @ weight.double().t() + tensors["bias"].double()) < 1e-2
    assert relative(x.grad, grad.double() @ weight.double()) < 1e-2
    assert values.grad.shape == values_shape(granularity, 0)


class Owner:
    def runtime_source(self):
        return None

    def runtime_reader(self):
        return None
