"""Odd shapes and every base, against float64 equations: what parametrised squares would not find."""

import zlib

import bitsandbytes as bnb
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft import get_peft_model
from torch import nn

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.ops import DenseSource, Plan, sparse_linear


def entry_positions(granularity, units, rows, cols, block):
    grid = torch.arange(rows * cols).reshape(rows, cols)
    if granularity == "entry":
        return grid.reshape(-1)[units]
    if granularity == "row":
        return grid[units]
    if granularity == "column":
        return grid[:, units].t()
    parts = [grid[i : i + block, j : j + block] for i in range(0, rows, block) for j in range(0, cols, block)]
    return torch.stack(parts)[units]


@st.composite
def cases(draw):
    granularity = draw(st.sampled_from(["entry", "block", "row", "column"]))
    block = draw(st.integers(1, 5))
    scale = block if granularity == "block" else 1
    rows, cols = draw(st.integers(1, 7)) * scale, draw(st.integers(1, 7)) * scale
    count = {"entry": rows * cols, "block": rows * cols // block**2, "row": rows, "column": cols}[granularity]
    k = draw(st.sampled_from([1, count, max(1, count // 2)]))  # one unit, full density, some
    lead = draw(st.sampled_from([(1,), (5,), (2, 3), (2, 1, 3)]))
    return granularity, block, rows, cols, count, k, lead, draw(st.integers(0, 3)), draw(st.integers(0, 2**16))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_any_shape_support_and_rank_matches_the_float64_equation(case):
    granularity, block, rows, cols, count, k, lead, rank, seed = case
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    units = torch.randperm(count, generator=generator)[:k].sort().values
    positions = entry_positions(granularity, units, rows, cols, block)
    weight, x, grad = randn(rows, cols), randn(*lead, cols), randn(*lead, rows)
    leaves = {"values": randn(*positions.shape)}
    if rank:
        leaves |= {"A": randn(rank, cols), "B": randn(rows, rank), "gate": randn(rank)}
    ours = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    x_ours = x.clone().requires_grad_()
    plan = Plan(rows, cols, torch.float64, DenseSource(weight), granularity, block, scale=1.5)
    y = sparse_linear(x_ours, plan, units=units.int(), **ours)
    y.backward(grad)

    theirs = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    x_theirs = x.clone().requires_grad_()
    delta = torch.zeros(rows * cols, dtype=torch.float64)
    delta = delta.index_put((positions.reshape(-1),), theirs["values"].reshape(-1)).view(rows, cols)
    if rank:
        delta = delta + 1.5 * theirs["B"] @ torch.diag(theirs["gate"]) @ theirs["A"]
    expected = x_theirs @ (weight + delta).t()
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    for name in leaves:
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, msg=name)


def dense_linear(rows, cols, dtype):
    return nn.Linear(cols, rows).to(dtype)


def four_bit(quant_type):
    def build(rows, cols, dtype):
        plain = nn.Linear(cols, rows)
        layer = bnb.nn.Linear4bit(cols, rows, compute_dtype=dtype, quant_type=quant_type)
        layer.load_state_dict(plain.state_dict())
        layer.bias.data = layer.bias.data.to(dtype)
        return layer.to("cpu")

    return build


def eight_bit(rows, cols, dtype):
    plain = nn.Linear(cols, rows)
    layer = bnb.nn.Linear8bitLt(cols, rows, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    layer.bias.data = layer.bias.data.to(dtype)
    return layer.to("cpu")


# Relative error: rounding of the dtype; int8 activations cost the 8-bit base a percent of its own output.
BASES = {
    "dense": (dense_linear, {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}),
    "nf4": (four_bit("nf4"), {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}),
    "fp4": (four_bit("fp4"), {torch.bfloat16: 2e-2}),
    "int8": (eight_bit, {torch.bfloat16: 4e-2, torch.float16: 4e-2}),
}
CASES = [(base, dtype) for base, (_, dtypes) in BASES.items() for dtype in dtypes]


@pytest.mark.parametrize("r", [0, 8])
@pytest.mark.parametrize("granularity", ["entry", "block", "row", "column"])
@pytest.mark.parametrize(("base", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "cols"), [(64, 128), (192, 64)], ids=["k/v-shaped", "up-shaped"])
def test_adapted_layer_matches_float64_on_every_base(rows, cols, base, dtype, granularity, r):
    build, tolerance = BASES[base]
    seed = zlib.crc32(f"{rows} {cols} {base} {dtype} {granularity} {r}".encode())
    torch.manual_seed(seed)
    model = nn.Sequential(build(rows, cols, dtype))
    options = {"granularity": granularity, "target_modules": ["0"], "bias": "all", "init_weights": False}
    adapted = get_peft_model(model, SparseLoraConfig(r=r, density=0.1, block_size=16, **options))
    layer = adapted.base_model.model[0]
    for name in ("sparse_lora_values", "sparse_lora_A", "sparse_lora_B"):
        for parameter in getattr(layer, name).values():
            parameter.data.mul_(0.1)
    weight = layer.get_base_weight().double()
    x = torch.randn(2, 6, cols).to(dtype)
    grad = torch.randn(2, 6, rows).to(dtype)
    y, grads = run(layer, x.clone().requires_grad_(), grad)
    expected, wanted = reference(layer, weight, x, grad, granularity)
    assert relative(y, expected) < tolerance[dtype], f"output, seed {seed}"
    for name, gradient in wanted.items():
        assert relative(grads[name], gradient) < tolerance[dtype], f"gradient of {name}, seed {seed}"
    with torch.no_grad():
        evaluated = layer.eval()(x)
    assert relative(evaluated, y.double()) < 2e-2, "training and evaluation disagree by more than bf16 rounding"


def run(layer, x, grad):
    layer.base_layer.bias.requires_grad_(layer.quantization_backend is None)
    y = layer.train()(x)
    y.backward(grad)
    grads = {"x": x.grad, "values": layer.sparse_lora_values["default"].grad}
    if layer.base_layer.bias.grad is not None:
        grads["bias"] = layer.base_layer.bias.grad
    if "default" in layer.sparse_lora_A:
        grads |= {"A": layer.sparse_lora_A["default"].grad, "B": layer.sparse_lora_B["default"].grad}
    return y.detach(), grads


def reference(layer, weight, x, grad, granularity):
    rows, cols = weight.shape
    leaves = {"x": x.double(), "values": layer.sparse_lora_values["default"].detach().double()}
    if layer.base_layer.bias.requires_grad:
        leaves["bias"] = layer.base_layer.bias.detach().double()
    if "default" in layer.sparse_lora_A:
        leaves |= {n: getattr(layer, f"sparse_lora_{n}")["default"].detach().double() for n in "AB"}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    positions = entry_positions(granularity, layer.units("default").long(), rows, cols, 16)
    delta = torch.zeros(rows * cols, dtype=torch.float64)
    delta = delta.index_put((positions.reshape(-1),), leaves["values"].reshape(-1)).view(rows, cols)
    if "A" in leaves:
        delta = delta + 2.0 * leaves["B"] @ leaves["A"]  # lora_alpha 16 over r 8
    y = leaves["x"] @ (weight + delta).t() + leaves.get("bias", layer.base_layer.bias.detach().double())
    y.backward(grad.double())
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def test_same_seed_gives_the_same_bits():
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = get_peft_model(
            nn.Sequential(nn.Linear(64, 64)), SparseLoraConfig(r=4, density=0.1, target_modules=["0"], seed=5)
        )
        layer = model.base_model.model[0]
        layer(torch.randn(4, 64)).square().sum().backward()
        outputs.append((layer.units("default"), layer.sparse_lora_values["default"].grad))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_adapting_a_70b_model_on_meta_takes_no_memory():

    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, SparseLoraConfig(r=8, density=0.005, target_modules="all-linear"))
    assert all(tensor.is_meta for tensor in [*adapted.parameters(), *adapted.buffers()])
    trainable, _ = adapted.get_nb_trainable_parameters()
    assert trainable > 300e6
