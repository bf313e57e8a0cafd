"""Several adapters on one model: sums, mixed batches, deletion, weighted combination."""

import itertools

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from tuner_toolbox import (
    GRANULARITIES,
    base_bits,
    dense_delta,
    dense_sparse_half,
    fill,
    logits,
    make_config,
    same_bits,
    token_ids,
)

from hf_sparse_peft.tuners import adapter_layers

PAIRS = [*itertools.combinations_with_replacement([f"hybrid-{unit}" for unit in GRANULARITIES], 2)]


def two_adapters(base_of, first="hybrid-entry", second="hybrid-entry", base="fp32", options=None, **common):
    model = get_peft_model(base_of(base), make_config(first, base, **common))
    model.add_adapter("other", make_config(second, base, **{"seed": 5, **common, **(options or {})}))
    fill(model)
    fill(model, "other", seed=8)
    return model


def both(model):
    model.base_model.set_adapter(["default", "other"])
    return model


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("base", ["fp32", "nf4", "conv1d"])
def test_active_adapters_add_up(base_of, base, pair):
    model = both(two_adapters(base_of, *pair, base=base))
    for layer in adapter_layers(model)[:2]:
        x = torch.randn(3, layer.in_features)
        weight = layer.dense_base_weight().double() + dense_delta(layer, "default") + dense_delta(layer, "other")
        expected = x.double() @ weight.t()
        if layer.get_base_layer().bias is not None:
            expected = expected + layer.get_base_layer().bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_different_blocks_sizes_add_up(base_of):
    model = both(two_adapters(base_of, "sparse-block", "sparse-block", options={"block_size": 8}))
    layer = adapter_layers(model)[0]
    x = torch.randn(3, layer.in_features)
    weight = layer.dense_base_weight().double() + dense_delta(layer, "default") + dense_delta(layer, "other")
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4", "int8"])
def test_adapters_on_different_modules_do_not_disturb_each_other(base_of, base):
    model = two_adapters(base_of, base=base, options={"target_modules": ["o_proj", "q_proj"]})
    alone = get_peft_model(base_of(base), make_config("hybrid-entry", base))
    fill(alone)
    assert torch.equal(logits(model), logits(alone))
    both_active = logits(both(model))
    assert not torch.equal(both_active, logits(alone))
    model.set_adapter("default")
    assert torch.equal(logits(model), logits(alone))


@pytest.mark.parametrize("pair", [("hybrid-entry", "hybrid-entry"), ("sparse-block", "hybrid-row")], ids="+".join)
@pytest.mark.parametrize("base", ["fp32", "nf4", "conv1d"])
def test_mixed_batch_gives_each_sample_its_adapter(base_of, base, pair):
    other = {} if base == "conv1d" else {"target_modules": ["o_proj", "q_proj"]}
    model = two_adapters(base_of, *pair, base=base, options=other).eval()
    ids = token_ids(batch=5)
    names = ["other", "__base__", "default", "other", "default"]
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model, ids)
    with model.disable_adapter():
        expected["__base__"] = logits(model, ids)
    mixed = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    assert torch.equal(logits(model, ids), expected["default"])  # no hook is left behind


def test_mixed_batch_refuses_what_it_cannot_do(base_of):
    model = two_adapters(base_of).eval()
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(model, adapter_names=["default"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=token_ids(), adapter_names=["default", "other"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        logits(model, adapter_names=["default", "other"])


@pytest.mark.parametrize("beams", [1, 3])
def test_mixed_batch_generates_as_each_adapter_alone(base_of, beams):
    model = two_adapters(base_of).eval()
    ids, options = token_ids(batch=2), {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    mixed = model.generate(input_ids=ids, adapter_names=["other", "default"], **options)
    for row, name in enumerate(["other", "default"]):
        model.set_adapter(name)
        assert torch.equal(model.generate(input_ids=ids[row : row + 1], **options)[0], mixed[row])


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_delete_adapter_leaves_nothing(base_of, base):
    model = two_adapters(base_of, base=base, options={"target_modules": ["o_proj", "q_proj"]})
    alone = get_peft_model(base_of(base), make_config("hybrid-entry", base))
    fill(alone)
    logits(both(model))
    model.delete_adapter("other")
    assert not [key for key in model.state_dict() if ".other" in key]
    for layer in adapter_layers(model):
        for name in (*layer.adapter_layer_names, *layer.other_param_names, "_units"):
            assert "other" not in getattr(layer, name)
    assert "other" not in model.peft_config
    assert torch.equal(logits(model), logits(alone))


def test_an_adapter_added_under_a_deleted_name_gets_its_own_support(base_of):
    model = two_adapters(base_of)
    for seed in range(6):
        logits(both(model))
        model.delete_adapter("other")
        model.add_adapter("other", make_config(seed=seed))
        fresh = get_peft_model(base_of(), make_config(seed=seed))
        for layer, reference in zip(adapter_layers(model), adapter_layers(fresh), strict=True):
            assert torch.equal(layer.units("other"), reference.units("default"))


# Weighted combination


@tiny.crossed(pair=PAIRS, kind=["cat", "svd", "linear"])
def test_weighted_sum_of_sparse_halves_is_exact(base_of, pair, kind, tmp_path):
    model = two_adapters(base_of, *pair)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mix", combination_type=kind)
    for layer in adapter_layers(model):
        expected = 0.7 * dense_sparse_half(layer, "default") - 0.4 * dense_sparse_half(layer, "other")
        torch.testing.assert_close(dense_sparse_half(layer, "mix"), expected, rtol=1e-6, atol=1e-7)
        if kind == "cat":
            total = 0.7 * dense_delta(layer, "default") - 0.4 * dense_delta(layer, "other")
            torch.testing.assert_close(dense_delta(layer, "mix"), total, rtol=1e-5, atol=1e-6)
        if kind == "svd":
            total = 0.7 * dense_delta(layer, "default") - 0.4 * dense_delta(layer, "other") - expected
            U, S, Vh = torch.linalg.svd(total)
            torch.testing.assert_close(
                dense_delta(layer, "mix") - expected, (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-3, atol=1e-5
            )
    reloads(model, base_of, tmp_path)


def reloads(model, base_of, folder, base="fp32"):
    model.set_adapter("mix")
    before = logits(model)
    model.save_pretrained(folder, selected_adapters=["mix"])
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(base), folder / "mix")), before)


@tiny.crossed(
    kind=["ties", "dare_linear", "dare_ties", "magnitude_prune"],
    pair=[("hybrid-entry", "hybrid-entry"), ("sparse-row", "sparse-row"), ("hybrid-block", "hybrid-column")],
    suffix=["", "_svd"],
)
def test_pruning_combinations_follow_merge_utils_on_the_united_support(base_of, kind, pair, suffix, tmp_path):
    model = two_adapters(base_of, *pair)
    torch.manual_seed(0)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "mix", kind + suffix, density=0.5)
    functions = {
        "ties": lambda t, w: ties(t, w, 0.5),
        "magnitude_prune": lambda t, w: magnitude_prune(t, w, 0.5),
        "dare_linear": lambda t, w: dare_linear(t, w, 0.5),
        "dare_ties": lambda t, w: dare_ties(t, w, 0.5),
    }
    for layer in adapter_layers(model):
        first, second = (dense_sparse_half(layer, name).float() for name in ("default", "other"))
        mixed = dense_sparse_half(layer, "mix").float()
        support = (first != 0) | (second != 0)
        assert not mixed[~support].any()
        if kind.startswith("dare"):  # random: every value is one of what dropping and rescaling can give
            a, b = 2 * 0.7 * first[support], 2 * 0.4 * second[support]
            possible = torch.stack([0 * a, a, b, a + b, (a + b) / 2])  # ties averages what agrees in sign
            assert ((possible - mixed[support]).abs().min(0).values < 1e-5).all()
            assert mixed[support].count_nonzero() > 0
        else:
            # United in the order of dense positions; whole units count as values even where one adapter lacks them.
            expected = functions[kind]([first[support], second[support]], torch.tensor([0.7, 0.4]))
            torch.testing.assert_close(mixed[support], expected, rtol=1e-5, atol=1e-6)
    reloads(model, base_of, tmp_path)


def test_combination_of_one_adapter_with_weight_one_is_that_adapter(base_of):
    model = two_adapters(base_of)
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["other"], [1.0], kind, combination_type=kind)
        for layer in adapter_layers(model):
            torch.testing.assert_close(dense_delta(layer, kind), dense_delta(layer, "other"), rtol=1e-4, atol=1e-5)


def test_combination_of_adapters_on_different_modules(base_of, tmp_path):
    model = two_adapters(base_of, options={"target_modules": ["o_proj", "q_proj"]})
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mix", combination_type="cat")
    expected = logits(both(model))
    model.set_adapter("mix")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    reloads(model, base_of, tmp_path)


def test_combination_of_adapters_on_different_layers_holds_both(base_of):
    model = two_adapters(base_of, layers_to_transform=[0], options={"layers_to_transform": [1]})
    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "mix", combination_type="cat")
    for layer in adapter_layers(model):
        source, weight = ("default", 1.0) if ".0." in layer.module_name else ("other", -0.5)
        torch.testing.assert_close(dense_delta(layer, "mix"), weight * dense_delta(layer, source), rtol=1e-5, atol=1e-6)


def test_combination_refuses_what_it_cannot_do_and_leaves_the_model(base_of):
    model = two_adapters(base_of, options={"r": 2})
    bits, keys = base_bits(model), set(model.state_dict())
    for arguments, field in [
        ((["default", "nobody"], [1, 1], "mix"), "nobody"),
        (([], [], "mix"), "adapters"),
        ((["default"], [1, 1], "mix"), "weights"),
        ((["default"], [1], "other"), "adapter_name"),
        ((["default"], [1], "mix", "average"), "combination_type"),
        ((["default"], [1], "mix", "ties"), "density"),
        ((["default", "other"], [1, 1], "mix", "linear"), "rank"),
    ]:
        with pytest.raises(ValueError, match=field):
            model.add_weighted_adapter(*arguments)
    assert set(model.state_dict()) == keys
    assert same_bits(base_bits(model), bits)
    assert set(model.peft_config) == {"default", "other"}
