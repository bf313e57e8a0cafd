"""Heads (`modules_to_save`) and biases are parts of an adapter: combined, merged and deleted with it, or refused."""

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig

IDS = torch.arange(1, 11)[None]


def config(kind="sparse", **options):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["score"], **options}
    return KernelLoraConfig(r=4, **options) if kind == "kernel" else SparseLoraConfig(r=2, density=0.1, **options)


def classifier(kind="sparse", names=("one", "two"), heads=("one", "two"), **options):
    """A classifier with adapters that differ in every number; those in `heads` have a head."""
    base = tiny.llama(LlamaForSequenceClassification, layers=1, num_labels=3)
    model = None
    for seed, name in enumerate(names):
        new = config(kind, **{**options, **({} if name in heads else {"modules_to_save": None})})
        if model is None:
            model = get_peft_model(base, new, adapter_name=name)
        else:
            model.add_adapter(name, new)
        model.set_adapter(name)
        fill(model, seed)
    model.set_adapter(names[0])
    return model.eval()


@torch.no_grad()
def fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model, name=None):
    if name is not None:
        model.set_adapter(name)
    return model(input_ids=IDS).logits


def head(model, name):
    return model.base_model.model.score.modules_to_save[name].weight.detach().clone()


@pytest.mark.parametrize("combination_type", ["linear", "cat", "svd", "ties"])
def test_one_adapter_at_weight_1_is_the_adapter_head_included(combination_type):
    model = classifier()
    expected = logits(model, "one")
    density = 1.0 if combination_type == "ties" else None
    model.add_weighted_adapter(["one"], [1.0], "mix", combination_type, density=density)
    assert torch.equal(head(model, "mix"), head(model, "one"))
    torch.testing.assert_close(logits(model, "mix"), expected, atol=1e-5, rtol=1e-5)
    assert model.peft_config["mix"].modules_to_save == ["score"]


def test_a_head_that_only_the_second_adapter_has_is_kept():
    model = classifier(heads=("two",))
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", "linear")
    assert torch.equal(head(model, "mix"), head(model, "two"))
    assert model.peft_config["mix"].modules_to_save == ["score"]
    with torch.no_grad():  # its own from now on
        model.base_model.model.score.modules_to_save["two"].weight.zero_()
    assert head(model, "mix").any()


def test_different_heads_are_refused_by_name_unless_the_user_says_which():
    model = classifier()
    with pytest.raises(ValueError, match=r"'one' and 'two'.*'score'"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", "linear")
    assert "mix" not in model.peft_config
    with pytest.raises(ValueError, match="modules_to_save_from='three'"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", "linear", modules_to_save_from="three")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", "linear", modules_to_save_from="two")
    assert torch.equal(head(model, "mix"), head(model, "two"))


def test_equal_heads_are_no_conflict():
    model = classifier()
    with torch.no_grad():
        wrapper = model.base_model.model.score
        wrapper.modules_to_save["two"].weight.copy_(wrapper.modules_to_save["one"].weight)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mix", "linear")
    assert torch.equal(head(model, "mix"), head(model, "one"))


def test_a_combination_is_saved_and_loaded_with_its_head(tmp_path):
    from peft import PeftModel

    model = classifier()
    model.add_weighted_adapter(["one"], [1.0], "mix", "linear")
    expected = logits(model, "mix")
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    base = tiny.llama(LlamaForSequenceClassification, layers=1, num_labels=3)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "mix").eval()), expected)


@pytest.mark.parametrize("bias", ["all", "sparse_lora_only"])
def test_an_adapter_with_biases_is_neither_combined_nor_deleted(bias):
    model = get_peft_model(
        tiny.llama(layers=1, attention_bias=True), config(bias=bias, modules_to_save=None), adapter_name="one"
    )
    with pytest.raises(ValueError, match=f"'one' has bias='{bias}'"):
        model.add_weighted_adapter(["one"], [1.0], "mix", "linear")
    with pytest.raises(ValueError, match=f"'one' has bias='{bias}'"):
        model.delete_adapter("one")
    assert list(model.peft_config) == ["one"]
    assert model.active_adapters == ["one"]


@pytest.mark.parametrize("kind", ["sparse", "kernel"])
@pytest.mark.parametrize("active", ["one", "two", "bare"])
def test_deleting_an_adapter_removes_its_head_and_uses_that_of_what_is_active_then(kind, active):
    model = classifier(kind, names=("one", "two", "bare"))
    of_one, of_two = logits(model, "one"), logits(model, "two")
    model.set_adapter(active)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    left = "one" if active != "one" else "two"
    model.delete_adapter("two" if active == "one" else active)
    if active == "one":
        left = "one"
        assert {name: p.requires_grad for name, p in model.named_parameters()} == {
            name: flag for name, flag in flags.items() if ".two" not in name
        }
    assert model.active_adapters == [left]
    assert torch.equal(logits(model), of_one)
    wrapper = model.base_model.model.score
    assert set(wrapper.modules_to_save) == {"one", "two"} - ({active} if active != "one" else {"two"})
    if "two" in wrapper.modules_to_save:
        assert torch.equal(logits(model, "two"), of_two)


def test_deleting_one_of_two_active_adapters_leaves_the_other_as_it_was():
    model = classifier(heads=("one",))
    model.base_model.set_adapter(["one", "two"])
    expected = logits(model, "two")
    model.base_model.set_adapter(["one", "two"])
    model.base_model.model.model.layers[0].self_attn.q_proj.sparse_lora_values["two"].requires_grad_(False)
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert torch.equal(logits(model), expected)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not layer.sparse_lora_values["two"].requires_grad
    assert layer.sparse_lora_A["two"].requires_grad


def test_deleting_the_last_adapter_gives_the_base_back():
    model = classifier(names=("one",))
    with model.disable_adapter():
        expected = logits(model)
    model.delete_adapter("one")
    assert model.active_adapters == []
    assert torch.equal(logits(model.base_model), expected)


@pytest.mark.parametrize("kind", ["sparse", "kernel"])
def test_merging_an_adapter_that_is_not_active_takes_its_own_head(kind):
    expected = logits(classifier(kind), "two")
    model = classifier(kind)
    model.set_adapter("one")
    with pytest.raises(ValueError, match=r"'two' has its own copy of 'score'.*set_adapter\('two'\)"):
        model.merge_adapter(["two"])
    with pytest.raises(ValueError, match="'one' and 'two'"):
        model.merge_and_unload(adapter_names=["one", "two"])
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["two"])), expected, atol=1e-5, rtol=1e-5)


def test_merging_an_adapter_without_a_head_takes_the_base_models():
    model = classifier(heads=("one",))
    expected = logits(model, "two")
    model.set_adapter("one")
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["two"])), expected, atol=1e-5, rtol=1e-5)
