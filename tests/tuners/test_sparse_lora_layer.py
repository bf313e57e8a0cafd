"""What a fresh adapter is, and the low-level contract between peft and an adapted layer."""

import warnings

import pytest
import tiny
import torch
from peft import get_layer_status, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tuner_toolbox import (
    BASES,
    CASES,
    base_bits,
    dense_delta,
    fill,
    logits,
    make_config,
    same_bits,
    token_ids,
    trained,
)

from hf_sparse_peft import Allocate, AverageRank
from hf_sparse_peft.tuners import adapter_layers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", ["fp32", "bf16", "conv1d"])
def test_fresh_adapter_is_the_identity_to_the_last_bit_on_dense_bases(base_of, base, case):
    model = base_of(base)
    before = logits(model)
    model = get_peft_model(model, make_config(case, base))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("case", CASES)
def test_fresh_adapter_is_the_identity_to_the_last_bit_on_nf4_in_training(base_of, case):
    # In evaluation without an adapter bitsandbytes uses another CPU kernel, with block scales rounded to bf16.
    ids = token_ids()
    before = base_of("nf4").train()(input_ids=ids).logits
    model = get_peft_model(base_of("nf4"), make_config(case)).train()
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("case", CASES)
def test_fresh_adapter_is_the_identity_up_to_one_rounding_on_int8(base_of, case):
    before = logits(base_of("int8"))
    after = logits(get_peft_model(base_of("int8"), make_config(case)))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@tiny.crossed(base=BASES, case=CASES)
def test_init_weights_false_changes_the_output(base_of, base, case):
    before = logits(base_of(base))
    after = logits(get_peft_model(base_of(base), make_config(case, base, init_weights=False)))
    assert (after - before).abs().max() > 0.05


@tiny.crossed(base=BASES, case=CASES)
def test_masters_are_fp32_and_only_the_adapter_trains(base_of, base, case):
    model = get_peft_model(base_of(base), make_config(case, base))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "sparse_lora_" in name
    }


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_autocast_adapter_dtype_false_takes_the_dtype_of_the_base(base_of, base):
    model = get_peft_model(base_of(base), make_config(), autocast_adapter_dtype=False)
    expected = torch.bfloat16 if base == "bf16" else torch.float32  # NF4: its compute dtype
    assert {p.dtype for p in trained(model).values()} == {expected}
    assert {layer.sparse_lora_support["default"].dtype for layer in adapter_layers(model)} == {torch.uint8}


@pytest.mark.parametrize("autocast", [True, False])
def test_second_adapter_is_born_frozen(base_of, autocast):
    model = get_peft_model(base_of("bf16"), make_config(), autocast_adapter_dtype=autocast)
    model.add_adapter("other", make_config("sparse-row"), autocast_adapter_dtype=autocast)
    assert not any(p.requires_grad for p in trained(model, "other").values())
    assert all(p.requires_grad for p in trained(model, "default").values())
    model.set_adapter("other")
    assert all(p.requires_grad for p in trained(model, "other").values())
    assert not any(p.requires_grad for p in trained(model, "default").values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", ["fp32", "conv1d", "nf4", "int8"])
def test_delta_weight_equals_the_equation(base_of, base, case):
    model = get_peft_model(base_of(base), make_config(case, base))
    fill(model)
    for layer in adapter_layers(model):
        delta = layer.get_delta_weight("default")
        expected = dense_delta(layer, "default")
        torch.testing.assert_close(delta.double(), expected.t() if base == "conv1d" else expected, rtol=1e-5, atol=1e-6)
        if base in ("fp32", "conv1d"):
            assert delta.shape == layer.get_base_layer().weight.shape


def test_gate_scales_components(base_of):
    model = get_peft_model(base_of(), make_config("low_rank-entry", schedule=[Allocate(budget=AverageRank(2))]))
    before = logits(base_of())
    assert torch.equal(logits(model), before)  # the zero gate is the identity
    fill(model)
    layer = adapter_layers(model)[0]
    torch.testing.assert_close(layer.get_delta_weight("default").double(), dense_delta(layer, "default"))
    assert not torch.equal(logits(model), before)


@pytest.mark.parametrize("base", BASES)
def test_repr_names_the_method_and_status_reads_it(base_of, base):
    model = get_peft_model(base_of(base), make_config(base=base))
    for layer in adapter_layers(model):
        assert repr(layer).startswith("sparse_lora.SparseLoraLinear(")
        assert (layer.in_features, layer.out_features) > (0, 0)
    status = get_layer_status(model)
    assert {entry.module_type for entry in status} == {"sparse_lora.SparseLoraLinear"}
    assert all(entry.enabled and entry.available_adapters == ["default"] for entry in status)
    assert model.get_model_status().peft_types == {"default": "SPARSE_LORA"}


def test_every_dict_keyed_by_adapter_is_known_to_peft(base_of):
    config = make_config(schedule=[Allocate(budget=AverageRank(2))])
    model = get_peft_model(base_of(), config)
    logits(model)
    for layer in adapter_layers(model):
        known = {*layer.adapter_layer_names, *layer.other_param_names, "_units"}
        keyed = {
            name
            for name, held in {**vars(layer), **dict(layer.named_children())}.items()
            if name not in ("_modules", "_parameters", "_buffers") and hasattr(held, "keys") and "default" in held
        }
        assert keyed <= known
        assert isinstance(layer, BaseTunerLayer)


@pytest.mark.parametrize("base", BASES)
def test_unmerging_what_is_not_merged_only_warns(base_of, base):
    model = get_peft_model(base_of(base), make_config(base=base))
    before = base_bits(model)
    with pytest.warns(UserWarning, match=r"^Already unmerged. Nothing to do.$"):
        model.unmerge_adapter()
    assert same_bits(base_bits(model), before)


@tiny.crossed(base=BASES, case=CASES)
def test_disabling_and_enabling_restores_every_bit(base_of, base, case):
    model = get_peft_model(base_of(base), make_config(case, base))
    plain = logits(model)
    bits = base_bits(model)
    fill(model)
    adapted = logits(model)
    with model.disable_adapter():
        disabled = logits(model)
    if base == "int8":  # base + zero is one rounding away from base
        torch.testing.assert_close(disabled, plain, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(disabled, plain)
    assert not torch.equal(adapted, plain)
    assert torch.equal(logits(model), adapted)
    assert same_bits(base_bits(model), bits)


def test_conv1d_sets_the_transposed_layout_by_itself_without_a_warning(base_of):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(base_of("conv1d"), make_config(base="conv1d"))
    assert all(layer.fan_in_fan_out for layer in adapter_layers(model))
    fill(model)
    layer = adapter_layers(model)[0]
    x = torch.randn(3, layer.in_features)
    weight = layer.get_base_layer().weight.double() + dense_delta(layer, "default").t()
    expected = x.double() @ weight + layer.get_base_layer().bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4", "conv1d"])
def test_a_training_step_leaves_the_base_as_it_was(base_of, base, case):
    model = get_peft_model(base_of(base), make_config(case, base))
    bits = base_bits(model)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):  # A moves once B has
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_bits(base_bits(model), bits)
    assert all(not torch.equal(p, before[name]) for name, p in trained(model).items())
