"""What a layer holds of its support beside the parameters: one buffer for entries, read as it is in every product."""

import copy
import warnings

import pytest
import tiny
import torch
from peft import get_peft_model
from support_codes import read_codes, seal

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers

IDS = torch.arange(1, 13).view(2, 6)


def layer_of(rows=512, cols=1024, density=0.03, **options):
    torch.manual_seed(0)
    config = SparseLoraConfig(r=0, density=density, target_modules=["0"], **options)
    return adapter_layers(get_peft_model(torch.nn.Sequential(torch.nn.Linear(cols, rows)), config))[0]


def index_bytes(layer):
    """Bytes of distinct storages of integers that the layer holds anywhere."""
    found = {}

    def look(value):
        if torch.is_tensor(value) and not value.is_floating_point():
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                look(item)

    for module in layer.modules():
        look(list(vars(module).values()))
    return sum(found.values())


def test_entries_take_less_than_two_bytes_each_after_a_step():
    layer = layer_of()
    layer(torch.randn(4, 1024)).sum().backward()
    count = layer.units("default").numel()
    assert index_bytes(layer) < 1.3 * count


def in_a_grid(layer, share=0.25, seed=0):
    """Move the support into a quarter of the rows and of the columns."""
    generator = torch.Generator().manual_seed(seed)
    count, sides = layer.units("default").numel(), (layer.out_features, layer.in_features)
    rows, columns = (torch.randperm(n, generator=generator)[: int(n * share)].sort().values for n in sides)
    inside = torch.randperm(rows.numel() * columns.numel(), generator=generator)[:count].sort().values
    units = rows[inside // columns.numel()] * sides[1] + columns[inside % columns.numel()]
    layer.write_support("default", units.int())
    return units


@pytest.mark.parametrize("wide", [True, False])
def test_entries_of_a_grid_keep_the_columns_of_their_inputs_and_match_float64(wide):
    layer = layer_of(*((256, 512) if wide else (64, 96)))
    units = in_a_grid(layer)
    packed = layer.packed_units("default")
    assert packed.live_rows.numel() * packed.live_columns.numel() <= layer.out_features * layer.in_features / 16
    values = layer.sparse_lora_values["default"]
    values.data.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(8, layer.in_features, generator=torch.Generator().manual_seed(2)).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    slices = [t for t in kept if t is not None and t.shape[:1] == (8,)]
    assert [t.shape[1] for t in slices] == [packed.live_columns.numel()]
    y.backward(grad := torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    dense = torch.zeros(layer.out_features * layer.in_features, dtype=torch.float64)
    dense[units] = values.detach().double()
    full = layer.base_layer.weight.detach().double() + dense.view(layer.out_features, -1)
    expected = x.double() @ full.t() + layer.base_layer.bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), grad.double() @ full, rtol=1e-5, atol=1e-5)
    wanted = (grad.double().t() @ x.detach().double()).flatten()[units]
    torch.testing.assert_close(values.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_free_support_knows_no_grid():
    assert layer_of().packed_units("default").live_rows is None


def test_a_move_reaches_the_next_product_and_breaks_a_backward_pass_that_is_under_way():
    layer = layer_of(64, 96)
    x = torch.randn(3, 96)
    y = layer(x)
    in_a_grid(layer)
    with pytest.raises(RuntimeError, match="moved between"):
        y.sum().backward()
    layer(x).sum().backward()
    expected = (torch.ones(64, 3) @ x).flatten()[layer.units("default").long()]
    torch.testing.assert_close(layer.sparse_lora_values["default"].grad, expected)


def test_the_same_bytes_written_again_break_no_backward_pass():
    """As a process group does to all buffers at every forward pass."""
    layer = layer_of(64, 96)
    y = layer(torch.randn(3, 96))
    with torch.no_grad():
        layer.sparse_lora_support["default"].copy_(layer.sparse_lora_support["default"].clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(3, 96))
        y.sum().backward()


@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_a_support_that_is_overwritten_from_outside_is_used_and_told(granularity):
    layer = layer_of(64, 96, 0.1, granularity=granularity)
    layer(torch.randn(3, 96))
    other = layer_of(64, 96, 0.1, granularity=granularity, seed=7)
    codes = layer.sparse_lora_support["default"]
    with torch.no_grad():
        codes.copy_(other.sparse_lora_support["default"])
    with pytest.warns(UserWarning, match="overwritten from outside"):
        layer(torch.randn(3, 96))
    assert layer.units("default").tolist() == read_codes(codes) == other.units("default").tolist()
    damaged = codes.clone()
    damaged[24] += 1
    seal(damaged)
    with torch.no_grad():
        codes.copy_(damaged)
    with pytest.raises(ValueError, match="units"):
        layer(torch.randn(3, 96))


def test_a_copied_model_has_an_index_of_its_own():
    model = get_peft_model(
        tiny.llama(layers=1), SparseLoraConfig(r=0, density=0.1, target_modules=["q_proj"], init_weights=False)
    )
    model(input_ids=IDS)
    other = copy.deepcopy(model)
    moved, still = adapter_layers(other)[0], adapter_layers(model)[0]
    before = still.units("default").clone()
    logits = model(input_ids=IDS).logits
    assert torch.equal(other(input_ids=IDS).logits, logits)
    in_a_grid(moved)
    assert torch.equal(still.units("default"), before)
    assert torch.equal(model(input_ids=IDS).logits, logits)
    assert not torch.equal(other(input_ids=IDS).logits, logits)
