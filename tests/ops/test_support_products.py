"""Products with a support beside the base's: exact, whatever way they take, and kept below the grid of bf16 weights."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.ops import DenseSource, DequantizedSource, Plan, core, sparse_linear
from hf_sparse_peft.tuners import adapter_layers

ROWS, COLS, BLOCK = 48, 32, 8
COUNT = {"entry": ROWS * COLS, "block": ROWS * COLS // BLOCK**2, "row": ROWS, "column": COLS, "diagonal": BLOCK}
SHAPE = {"entry": (), "block": (BLOCK, BLOCK), "row": (COLS,), "column": (ROWS,), "diagonal": (6, 4)}
"""With `BLOCK` as the number of blocks on the diagonal."""


def dense_update(granularity, units, values):
    """The support as a `[rows, cols]` float64 matrix, by counting positions one after the other."""
    delta = torch.zeros(ROWS, COLS, dtype=torch.float64)
    for unit, value in zip(units.tolist(), values.double(), strict=True):
        if granularity == "entry":
            delta[unit // COLS, unit % COLS] = value
        elif granularity == "row":
            delta[unit] = value
        elif granularity == "column":
            delta[:, unit] = value
        elif granularity == "diagonal":
            delta[unit * 6 : (unit + 1) * 6, unit * 4 : (unit + 1) * 4] = value
        else:
            row, col = divmod(unit, COLS // BLOCK)
            delta[row * BLOCK : (row + 1) * BLOCK, col * BLOCK : (col + 1) * BLOCK] = value
    return delta


def problem(granularity, count, dtype, tokens=12, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    units = torch.randperm(COUNT[granularity], generator=generator)[:count].sort().values.int()
    values = size * torch.randn(count, *SHAPE[granularity], generator=generator)
    weight = torch.randn(ROWS, COLS, generator=generator).to(dtype)
    x = torch.randn(tokens, COLS, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(tokens, ROWS, generator=generator).to(dtype)
    return units, values, weight, x, grad


def source_of(kind, weight):
    if kind == "dense":
        return DenseSource(weight)
    if kind == "transposed":
        return DenseSource(weight.t().contiguous(), transposed=True)
    return DequantizedSource(lambda dtype: weight.to(dtype, copy=True)) if kind == "dequantized" else None


@pytest.mark.parametrize("beside", [True, False], ids=["product", "copy"])
@pytest.mark.parametrize("kind", ["dense", "transposed", "dequantized", "update alone"])
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("granularity", list(COUNT))
def test_product_and_copy_both_match_float64(granularity, share, kind, beside, monkeypatch):
    monkeypatch.setattr(core, "runs_beside", lambda *_, **__: beside)
    units, values, weight, x, grad = problem(granularity, max(1, int(share * COUNT[granularity])), torch.float32)
    y = sparse_linear(
        x, Plan(ROWS, COLS, torch.float32, source_of(kind, weight), granularity, BLOCK), values=values, units=units
    )
    y.backward(grad)
    full = dense_update(granularity, units, values) + (weight.double() if kind != "update alone" else 0)
    torch.testing.assert_close(y.double(), x.double() @ full.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), grad.double() @ full, rtol=1e-4, atol=1e-4)


def bf16_steps(found, *terms):
    """Largest distance of `found` from the sum of `terms`, in half steps of the bf16 grid at the largest term."""
    largest = torch.stack([term.abs() for term in (*terms, sum(terms))]).amax(0)
    step = 2.0 ** (torch.floor(torch.log2(largest)) - 7)
    return ((found.double() - sum(terms)).abs() / (step / 2)).max().item()


@pytest.mark.parametrize("tokens", [4, 640], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("kind", ["dense", "transposed", "dequantized"])
@pytest.mark.parametrize("granularity", ["row", "column", "block", "diagonal"])
def test_updates_below_the_grid_of_bf16_weights_reach_the_output_and_the_input_gradient(granularity, kind, tokens):
    units, values, weight, x, grad = problem(granularity, COUNT[granularity] // 3, torch.bfloat16, tokens, size=1e-4)
    weight = (weight.sign() * 32).bfloat16()  # neighbours are 0.25 apart: base + 1e-4 is the base
    weight[:, 1::2] = -weight[:, ::2]  # and inputs that come in pairs cancel what the base adds
    weight[1::2] = -weight[::2]
    with torch.no_grad():
        x[:, 1::2] = x[:, ::2]
        grad[:, 1::2] = grad[:, ::2]
    y = sparse_linear(
        x, Plan(ROWS, COLS, torch.bfloat16, source_of(kind, weight), granularity, BLOCK), values=values, units=units
    )
    y.backward(grad)
    delta = dense_update(granularity, units, values)
    compared = [(y, x.double() @ delta.t()), (x.grad, grad.double() @ delta)]
    for found, expected in compared[:1] if granularity in ("block", "diagonal") and tokens > 600 else compared:
        assert expected.abs().max() > 1e-5
        assert (found.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("granularity", ["row", "column", "block", "entry", "diagonal"])
def test_outputs_over_bf16_weights_are_float64s_to_bf16_rounding(granularity):
    units, values, weight, x, _ = problem(granularity, COUNT[granularity] // 2, torch.bfloat16, size=0.1)
    y = sparse_linear(
        x, Plan(ROWS, COLS, torch.bfloat16, DenseSource(weight), granularity, BLOCK), values=values, units=units
    )
    base, update = (x.double() @ w.double().t() for w in (weight, dense_update(granularity, units, values)))
    assert bf16_steps(y, base, update) < 4  # base, update and sum are rounded, each by half a step at most


def test_many_blocks_over_one_output_are_summed_before_they_are_rounded():
    tokens, columns = 64, 128  # blocks, each of which adds less than the output's grid can hold
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(tokens, columns * BLOCK, generator=generator).bfloat16()
    weight = torch.full((BLOCK, columns * BLOCK), 1.0).bfloat16()
    units = torch.arange(columns, dtype=torch.int32)
    values = torch.full((columns, BLOCK, BLOCK), 2.0**-8)
    plan = Plan(BLOCK, columns * BLOCK, torch.bfloat16, DenseSource(weight), "block", BLOCK)
    y = sparse_linear(x, plan, values=values, units=units).double()
    base = x.double().sum(1, keepdim=True)
    assert ((y - base).mean() / (base * 2.0**-8).mean() - 1).abs() < 0.4


def test_the_input_gradient_of_blocks_over_many_tokens_is_float64s_to_bf16_rounding():
    units, values, weight, x, grad = problem("block", COUNT["block"] // 3, torch.bfloat16, tokens=640, size=0.1)
    plan = Plan(ROWS, COLS, torch.bfloat16, DenseSource(weight), "block", BLOCK)
    sparse_linear(x, plan, values=values, units=units).backward(grad)
    expected = grad.double() @ (weight.double() + dense_update("block", units, values))
    assert (x.grad.double() - expected).norm() < 2.0**-8 * expected.norm()


@pytest.mark.parametrize("granularity", ["row", "column", "block", "entry", "diagonal"])
def test_small_updates_on_the_largest_weights_of_a_bf16_model_move_its_logits(granularity):
    model = tiny.llama(layers=1, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(8)
    ids = torch.arange(1, 9).view(1, 8)
    plain = model(input_ids=ids).logits
    cut = {"granularity": granularity, "block_size": 8, "diagonal_blocks": 8}
    config = SparseLoraConfig(r=0, density=0.5, **cut, target_modules=["down_proj"])
    adapted = get_peft_model(model, config).eval()
    assert torch.equal(adapted(input_ids=ids).logits, plain)  # zeros change nothing
    layer = adapter_layers(adapted)[0]
    with torch.no_grad():
        layer.sparse_lora_values["default"].fill_(1e-4)
    x, seen = torch.randn(6, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16(), {}
    with torch.no_grad():
        seen["with"], seen["without"] = layer(x), layer.base_layer(x)
    assert not torch.equal(seen["with"], seen["without"])
    grid, units = layer.sparse_lora_grid["default"], layer.units("default")
    delta = torch.zeros(layer.out_features * layer.in_features, dtype=torch.float64)
    delta[grid.entry_positions(units).reshape(-1)] = 1e-4
    weights = layer.base_layer.weight.detach().double(), delta.view(layer.out_features, layer.in_features)
    assert bf16_steps(seen["with"], *(x.double() @ weight.t() for weight in weights)) < 4


def test_entries_for_few_and_for_many_tokens_take_different_ways_to_the_same_output():
    units, values, weight, x, _ = problem("entry", 200, torch.float32, tokens=600)
    plan = Plan(ROWS, COLS, torch.float32, DenseSource(weight))
    together = sparse_linear(x, plan, values=values, units=units)
    one_by_one = torch.cat([sparse_linear(row[None], plan, values=values, units=units) for row in x[:20]])
    torch.testing.assert_close(one_by_one, together[:20], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", [*COUNT, "subnet"])
def test_compiled_nodes_mutate_and_alias_nothing(granularity):
    subnet = granularity == "subnet"
    units, values, weight, x, _ = problem("entry" if subnet else granularity, 4, torch.float32)
    rows, columns = (torch.tensor(side, dtype=torch.int32) for side in ([1, 3], [0, 5])) if subnet else (None, None)
    units, values = (None, values.view(2, 2)) if subnet else (units, values)
    config = SparseLoraConfig(r=0, density=0.1, target_modules=["0"])
    owner = get_peft_model(torch.nn.Sequential(torch.nn.Linear(COLS, ROWS)), config).base_model.model[0]
    arguments = (x, weight, values.requires_grad_(), units, None, None, None, None, None, rows, columns)
    options = (owner._owner, False, False, ROWS, granularity, BLOCK, 1.0, False, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_sparse_peft.sparse_linear.default, (*arguments, *options), test_utils=checks)


def test_peak_memory_grows_by_one_layers_weight_at_most():
    """Largest sum of live weight-sized buffers while a product runs, counted by their creation and deletion."""
    import weakref

    from torch.utils._python_dispatch import TorchDispatchMode

    rows, cols, tokens = 256, 128, 300
    live, peak = weakref.WeakValueDictionary(), []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if torch.is_tensor(tensor) and tensor.layout == torch.strided and tensor.numel() >= rows * cols:
                    storage = tensor.untyped_storage()
                    if storage.nbytes() >= rows * cols * 4 and storage.data_ptr() != weight.data_ptr():
                        live[storage.data_ptr()] = tensor
            peak.append(len(live))
            return out

    weight, x = torch.randn(rows, cols), torch.randn(tokens // 4, cols, requires_grad=True)
    units, values = torch.arange(0, rows * cols, 2), torch.randn(rows * cols // 2)
    with Count():
        y = sparse_linear(x, Plan(rows, cols, torch.float32, DenseSource(weight)), values=values, units=units)
        y.backward(torch.ones_like(y))
    assert max(peak) == 1, "one private copy at a time"
    assert not live, "and none that stays"
