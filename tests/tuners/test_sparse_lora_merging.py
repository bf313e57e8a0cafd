"""Merging folds an adapter into the base, unmerging restores every bit of it, and a lossy merge says what it lost."""

import itertools

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn
from tuner_toolbox import BASES, CASES, base_bits, dense_delta, fill, logits, make_config, same_bits, trained

from hf_sparse_peft.tuners import adapter_layers

DENSE = ("fp32", "bf16", "conv1d")


def adapted(base_of, base, case="hybrid-entry", **options):
    model = get_peft_model(base_of(base), make_config(case, base, **options))
    fill(model)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", BASES)
def test_unmerge_restores_every_base_bit(base_of, base, case):
    model = adapted(base_of, base, case)
    before, bits = logits(model), base_bits(model)
    model.merge_adapter()
    assert not same_bits(base_bits(model), bits)
    model.unmerge_adapter()
    assert same_bits(base_bits(model), bits)
    assert torch.equal(logits(model), before)


@tiny.crossed(base=DENSE, case=CASES, safe=[False, True])
def test_merged_logits_equal_unmerged_ones(base_of, base, case, safe):
    model = adapted(base_of, base, case)
    before = logits(model)
    model.merge_adapter(safe_merge=safe)
    after = logits(model)
    tolerance = 0.15 if base == "bf16" else 1e-4  # until merged, an update is a product beside the base's
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("base", DENSE)
def test_merged_weight_is_one_rounding_of_base_plus_delta(base_of, base):
    model = adapted(base_of, base)
    layers = adapter_layers(model)
    expected = []
    for layer in layers:
        weight = layer.get_base_layer().weight.detach().double()
        delta = dense_delta(layer, "default")
        expected.append(weight + (delta.t() if base == "conv1d" else delta))
    model.merge_adapter()
    for layer, reference in zip(layers, expected, strict=True):
        merged = layer.get_base_layer().weight
        ulp = 2**-8 if base == "bf16" else 1e-6
        assert ((merged.double() - reference).abs() <= ulp * reference.abs() + 1e-7).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_quantised_merge_reports_the_error_it_measured(base_of, base, case):
    model = adapted(base_of, base, case)
    expected = {
        layer.module_name: layer.get_base_weight().double() + dense_delta(layer, "default")
        for layer in adapter_layers(model)
    }
    assert model.merge_errors() == {}
    model.merge_adapter()
    errors = model.merge_errors()
    assert errors.keys() == expected.keys()
    for layer in adapter_layers(model):
        reference = expected[layer.module_name]
        error = (layer.get_base_weight().double() - reference).norm() / reference.norm()
        assert errors[layer.module_name] == pytest.approx(float(error), rel=1e-3)
        assert 1e-4 < errors[layer.module_name] < (0.2 if base == "nf4" else 0.05)
    model.unmerge_adapter()
    assert model.merge_errors() == {}
    model.merge_and_unload()
    assert model.merge_errors() == pytest.approx(errors)


def test_dense_merge_reports_no_error(base_of):
    model = adapted(base_of, "fp32")
    model.merge_adapter()
    assert model.merge_errors() == {}


def test_quantised_merge_warns_of_its_rounding(base_of):
    from hf_sparse_peft.tuners.shared.merge import _warn_requantised

    _warn_requantised.cache_clear()
    model = adapted(base_of, "nf4")
    with pytest.warns(UserWarning, match="merge_errors"):
        model.merge_adapter()


@pytest.mark.parametrize("base", BASES)
def test_safe_merge_of_nan_has_upstreams_message_and_leaves_the_base(base_of, base):
    model = adapted(base_of, base)
    bits = base_bits(model)
    adapter_layers(model)[0].sparse_lora_values["default"].data[3] = float("nan")
    message = r"^NaNs detected in the merged weights. The adapter default seems to be broken$"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    assert same_bits(base_bits(model), bits)
    with pytest.raises(ValueError, match=message):
        model.merge_and_unload(safe_merge=True)
    assert same_bits(base_bits(model), bits)


def test_safe_merge_names_the_adapter_that_is_broken(base_of):
    model = adapted(base_of, "fp32")
    model.add_adapter("other", make_config("sparse-row", "fp32"))
    adapter_layers(model)[0].sparse_lora_values["default"].data[3] = float("nan")
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_adapter(["default", "other"], safe_merge=True)


@pytest.mark.parametrize("base", BASES)
def test_failed_safe_merge_keeps_what_was_merged_before(base_of, base):
    model = adapted(base_of, base)
    model.add_adapter("broken", make_config("sparse-row", base))
    fill(model, "broken")
    bits = base_bits(model)
    model.merge_adapter(["default"])
    merged = base_bits(model)
    for layer in adapter_layers(model):
        layer.sparse_lora_values["broken"].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="The adapter broken seems to be broken"):
        model.merge_adapter(["broken"], safe_merge=True)
    assert same_bits(base_bits(model), merged)
    assert {tuple(layer.merged_adapters) for layer in adapter_layers(model)} == {("default",)}
    model.unmerge_adapter()
    assert same_bits(base_bits(model), bits)


@pytest.mark.parametrize("base", BASES)
def test_order_of_merging_does_not_matter_and_all_are_unmerged(base_of, base):
    results = {}
    for order in itertools.permutations(("default", "rows", "elsewhere")):
        model = adapted(base_of, base)
        model.add_adapter("rows", make_config("hybrid-row", base))
        other = ["c_proj"] if base == "conv1d" else ["o_proj", "q_proj"]
        model.add_adapter("elsewhere", make_config("sparse-column", base, target_modules=other))
        fill(model, "rows", seed=8)
        fill(model, "elsewhere", seed=9)
        bits = base_bits(model)
        for name in order:
            model.merge_adapter([name])
        results[order] = logits(model)
        model.unmerge_adapter()
        assert same_bits(base_bits(model), bits)
    first, *others = results.values()
    model.merge_adapter(["default", "rows", "elsewhere"])
    for result in [*others, logits(model)]:
        # Deltas are summed in fp32 before the one rounding: what is left is the order of fp32 additions, which may flip
        # a bf16 rounding or a quantisation step.
        tolerance = {"fp32": 1e-4, "conv1d": 1e-4}.get(base, 0.1)
        torch.testing.assert_close(result, first, rtol=tolerance, atol=tolerance)


def test_explicit_names_are_honoured_and_absent_ones_skipped(base_of):
    model = adapted(base_of, "fp32", "sparse-entry")
    model.add_adapter("other", make_config("sparse-entry", target_modules=["o_proj"]))
    fill(model, "other")
    model.merge_adapter(["other"])
    for layer in adapter_layers(model):
        assert layer.merged_adapters == (["other"] if "o_proj" in layer.module_name else [])


def test_merging_twice_warns_and_changes_nothing(base_of):
    model = adapted(base_of, "fp32")
    model.merge_adapter()
    bits = base_bits(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert same_bits(base_bits(model), bits)


@pytest.mark.parametrize("base", BASES)
def test_disabling_unmerges_by_itself(base_of, base):
    model = adapted(base_of, base)
    bits, before = base_bits(model), logits(model)
    with model.disable_adapter():
        plain = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert same_bits(base_bits(model), bits)
    assert torch.equal(logits(model), before)


@tiny.crossed(base=BASES, case=CASES)
def test_merge_and_unload_leaves_a_plain_model_with_the_merged_output(base_of, base, case):
    model = adapted(base_of, base, case)
    names = {
        name.replace(".base_layer", "")
        for name, _ in model.get_base_model().named_modules()
        if "sparse_lora" not in name
    }
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert not adapter_layers(plain)
    assert {name for name, _ in plain.named_modules()} == names
    assert torch.equal(logits(plain), merged)


@pytest.mark.parametrize("base", BASES)
def test_unload_gives_the_base_back(base_of, base):
    before = base_bits(base_of(base))
    model = adapted(base_of, base)
    plain = model.unload()
    assert not adapter_layers(plain)
    assert same_bits(base_bits(plain), before)


def test_merging_ignores_dropout_in_training_mode(base_of):
    weights = []
    for _ in range(2):
        model = adapted(base_of, "fp32", lora_dropout=0.5).train()
        model.merge_adapter()
        weights.append(base_bits(model))
    assert same_bits(*weights)


def test_merged_weight_of_a_tied_embedding_is_warned_about(base_of):
    from tuner_toolbox import tiny_llama

    model = get_peft_model(tiny_llama(tie_word_embeddings=True), make_config(target_modules=["lm_head"]))
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()


def test_a_merged_layer_still_frees_its_adapter_parameters_of_gradients(base_of):
    model = adapted(base_of, "fp32")
    model.merge_adapter()
    x = torch.randn(2, 64, requires_grad=True)
    layer = adapter_layers(model)[0]
    layer(x).sum().backward()
    assert all(p.grad is None for p in trained(model).values())
    assert isinstance(layer.get_base_layer().weight, nn.Parameter)
