"""Blocks in few columns of a weight: the backward pass keeps those columns of its input alone, and finds the same
bits."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hf_sparse_peft import Prune, SparseLoraConfig
from hf_sparse_peft.ops import (
    DenseSource,
    DequantizedSource,
    Plan,
    register_owner,
    sparse_linear,
    sparse_linear_node,
)
from hf_sparse_peft.tuners import adapter_layers

ROWS, COLS, BLOCK, TOKENS = 24, 80, 8, 12
UNITS = torch.tensor([3, 7, 13, 23])
"""Two blocks in column 3 and one in column 7 of the ten, and one more in column 3."""
LIVE = torch.tensor([3, 7])


def problem(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (2, TOKENS // 2, COLS), "values": (4, BLOCK, BLOCK), "bias": (ROWS,)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    tensors = {name: tensor.to(dtype if name != "values" else torch.float32) for name, tensor in tensors.items()}
    if dtype == torch.float64:
        tensors["values"] = tensors["values"].double()
    weight = torch.randn(ROWS, COLS, generator=generator, dtype=torch.float64).to(dtype)
    return tensors, weight, torch.randn(2, TOKENS // 2, ROWS, generator=generator, dtype=torch.float64).to(dtype)


def sources(weight):
    yield DenseSource(weight)
    yield DenseSource(weight.t().contiguous(), transposed=True)
    yield DequantizedSource(lambda dtype: weight.to(dtype, copy=True))
    yield None


def run(tensors, plan, live=LIVE, **more):
    """Output, leaves, and what is kept of the input."""
    leaves, kept = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}, []
    own = {leaf.untyped_storage().data_ptr() for name, leaf in leaves.items() if name != "x"}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        arguments = {name: leaf for name, leaf in leaves.items() if name != "x"}
        if plan.source is None:
            del arguments["bias"]
        y = sparse_linear(leaves["x"], plan, units=UNITS, live_columns=live, **arguments, **more)
    floats = (t for t in kept if t is not None and t.is_floating_point())
    return y, leaves, [t for t in floats if t.untyped_storage().data_ptr() not in own]


def plan_of(dtype=torch.float32, source=None, **options):
    return Plan(ROWS, COLS, dtype, source, "block", BLOCK, **options)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs_and_gradients_are_those_of_a_kept_input_to_the_bit_and_the_dense_equations(dtype):
    tensors, weight, grad = problem(dtype)
    wide = {name: tensor.double().clone().requires_grad_() for name, tensor in tensors.items()}
    change = torch.zeros(ROWS, COLS, dtype=torch.float64)
    for at, unit in enumerate(UNITS.tolist()):
        row, column = unit // 10 * BLOCK, unit % 10 * BLOCK
        place = torch.zeros(ROWS, BLOCK, dtype=torch.float64), torch.zeros(BLOCK, COLS, dtype=torch.float64)
        place[0][row : row + BLOCK] = torch.eye(BLOCK, dtype=torch.float64)
        place[1][:, column : column + BLOCK] = torch.eye(BLOCK, dtype=torch.float64)
        change = change + place[0] @ wide["values"][at] @ place[1]
    expected = wide["x"] @ (weight.double() + change).t() + wide["bias"]
    expected.backward(grad.double())
    for source in sources(weight):
        narrow, kept_whole = (run(tensors, plan_of(dtype, source), live) for live in (LIVE, None))
        assert torch.equal(narrow[0], kept_whole[0])
        for y, _, _ in (narrow, kept_whole):
            y.backward(grad)
        for name in tensors if source is not None else ("x", "values"):
            assert torch.equal(narrow[1][name].grad, kept_whole[1][name].grad), name
            if source is not None or name == "values":
                error = (narrow[1][name].grad.double() - wide[name].grad).norm() / wide[name].grad.norm()
                assert error < TOLERANCE[dtype], name
        assert [tuple(t.shape) for t in narrow[2]] == [(TOKENS, 2 * BLOCK)]
        assert narrow[2][0].untyped_storage().nbytes() == TOKENS * 2 * BLOCK * tensors["x"].element_size()
        assert [tuple(t.shape) for t in kept_whole[2]] == [(2, TOKENS // 2, COLS)]


def test_the_whole_input_is_kept_where_somebody_needs_it():
    tensors, weight, _ = problem()
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(3, COLS, generator=generator), torch.randn(ROWS, 3, generator=generator)
    whole = [(2, TOKENS // 2, COLS)]
    for options, more in (
        ({"gradient_reader": [].append}, {}),
        ({"passive_reader": [].append}, {}),
        ({}, {"A": A.requires_grad_(), "B": B.requires_grad_()}),
        ({}, {"live": torch.tensor([1, 3, 5, 7])}),  # more than a third of the ten
    ):
        *_, kept = run(tensors, plan_of(source=DenseSource(weight), **options), **more)
        own = {t.untyped_storage().data_ptr() for t in more.values()}
        assert [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own] == whole
    x = tensors["x"].clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for live in (None, LIVE):  # a layer that shares an input which another one keeps
            values = tensors["values"].clone().requires_grad_()
            sparse_linear(x, plan_of(source=DenseSource(weight)), values=values, units=UNITS, live_columns=live)
    assert {t.data_ptr() for t in kept if t is not None and t.shape[-1] in (COLS, 2 * BLOCK)} == {x.data_ptr()}


def test_an_input_that_is_a_product_of_two_activations_is_multiplied_again_in_those_columns():
    tensors, weight, grad = problem()
    gate, up = (torch.randn(TOKENS, COLS, generator=torch.Generator().manual_seed(at)) for at in (1, 2))
    found = []
    for live in (LIVE, None):
        factors = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        kept, values = [], tensors["values"].clone().requires_grad_()
        x = torch.nn.functional.silu(factors[0]) * (factors[1] + 1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = sparse_linear(x, plan_of(source=DenseSource(weight)), values=values, units=UNITS, live_columns=live)
        assert not [t for t in kept if t is not None and t.shape[:1] == (TOKENS,)]
        y.backward(grad.reshape(TOKENS, ROWS))
        found.append([values.grad, *(one.grad for one in factors)])
    assert all(map(torch.equal, *found))


def test_no_block_at_all_has_an_empty_gradient():
    tensors, weight, grad = problem()
    x, values = tensors["x"].requires_grad_(), torch.zeros(0, BLOCK, BLOCK, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int32)
    y = sparse_linear(x, plan_of(source=DenseSource(weight)), values=values, units=none, live_columns=none)
    y.backward(grad)
    assert values.grad.shape == values.shape
    torch.testing.assert_close(x.grad, grad @ weight)


class Owner:
    def runtime_source(self):
        return None

    def runtime_reader(self):
        return None


def test_a_compiled_node_keeps_only_these_columns_and_finds_the_eager_gradients():
    tensors, weight, grad = problem()
    number, found = register_owner(owner := Owner()), []
    y, leaves, _ = run(tensors, plan_of(source=DenseSource(weight)))
    y.backward(grad)
    again = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        z = sparse_linear_node(
            again["x"], number, ROWS, weight=weight, values=again["values"], bias=again["bias"], units=UNITS,
            live_columns=LIVE, granularity="block", block_size=BLOCK,
        )  # fmt: skip
    z.backward(grad)
    assert owner is not None
    assert [tuple(t.shape) for t in found if t is not None and t.shape[:1] == (TOKENS,)] == [(TOKENS, 2 * BLOCK)]
    assert not [t for t in found if t is not None and t.shape == tensors["x"].shape]
    assert torch.equal(z, y)
    for name in tensors:
        torch.testing.assert_close(again[name].grad, leaves[name].grad, msg=name)


# Layers


def layer_with(units: torch.Tensor, schedule=(), **options):
    torch.manual_seed(0)
    config = SparseLoraConfig(
        r=0, density=units.numel() / 30, granularity="block", block_size=BLOCK, target_modules=["0"],
        schedule=list(schedule), **options,
    )  # fmt: skip
    (layer,) = adapter_layers(get_peft_model(nn.Sequential(nn.Linear(COLS, ROWS)), config))
    layer.write_support("default", units.int())
    layer.sparse_lora_values["default"].data.normal_(generator=torch.Generator().manual_seed(2))
    return layer


def activations_kept(layer, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    return [tuple(t.shape) for t in kept if t is not None and t.shape[:1] == (TOKENS,)]


def test_a_layer_keeps_the_columns_of_its_blocks_until_its_support_is_another():
    layer, x = layer_with(UNITS), torch.randn(TOKENS, COLS, requires_grad=True)
    assert layer.packed_units("default").live_columns.tolist() == LIVE.tolist()
    assert activations_kept(layer, x) == [(TOKENS, 2 * BLOCK)]
    layer.write_support("default", torch.tensor([5, 15, 25, 26], dtype=torch.int32))
    assert layer.packed_units("default").live_columns.tolist() == [5, 6]
    layer(x).square().sum().backward()
    wide = x.detach().double().requires_grad_()
    change = layer.get_delta_weight("default").double()
    (wide @ (layer.base_layer.weight.double() + change).t() + layer.base_layer.bias.double()).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
    layer.write_support("default", torch.tensor([0, 2, 4, 6], dtype=torch.int32))
    assert activations_kept(layer, x) == [(TOKENS, COLS)]


def test_blocks_that_a_rule_moves_keep_the_input_whole():
    layer = layer_with(UNITS, [Prune()])
    assert layer.packed_units("default").live_columns is None
    assert activations_kept(layer.train(), torch.randn(TOKENS, COLS, requires_grad=True)) == [(TOKENS, COLS)]
