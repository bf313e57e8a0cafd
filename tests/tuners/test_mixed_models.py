"""`PeftMixedModel`: adapters of this package beside peft's own, in either order."""

import warnings

import pytest
import tiny
import torch
from peft import LoHaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from hf_sparse_peft import (
    AccumulatedGradient,
    KernelLoraConfig,
    Regrow,
    SparseLoraConfig,
    SpectralLoraConfig,
    StructuredConfig,
    callbacks_for,
)
from hf_sparse_peft.hub import check_adapter, merge_to_dense
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.structured import Kronecker
from hf_sparse_peft.utils.checksums import save_checked

IDS = torch.randint(1, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
TARGETS = {"target_modules": ["q_proj", "down_proj"]}


def sparse(**options):
    return SparseLoraConfig(**{"r": 2, "density": 0.1, **TARGETS, **options})


CONFIGS = {
    "sparse": sparse,
    "kernel": lambda: KernelLoraConfig(r=4, **TARGETS),
    "spectral": lambda: SpectralLoraConfig(r=4, **TARGETS),
    "structured": lambda: StructuredConfig(form=Kronecker(4, 2), **TARGETS),
    "lora": lambda **options: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


def fill(model, name):
    """Other values for each adapter, the same wherever its layers lie."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0].replace(".base_layer", "")):
            if f".{name}" in key and "base_layer.weight" not in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def mixed(*names, base=None):
    """Adapters of these names, which are kinds, added in this order, all active."""
    model = get_peft_model(base or tiny.base("fp32"), CONFIGS[names[0]](), names[0], mixed=True)
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name]())
    for name in names:
        fill(model, name)
    model.set_adapter(list(names))
    return model


def delta_of(name):
    """The update of each weight by an adapter alone on a model of its own, in float64."""
    model = fill(get_peft_model(tiny.base("fp32"), CONFIGS[name](), name), name)
    found = {}
    for key, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[key] = module.get_delta_weight(name).detach().double()
    return found


@pytest.mark.parametrize(
    "names",
    [("sparse", "lora"), ("lora", "sparse"), ("lora", "kernel"), ("spectral", "loha"), ("sparse", "lora", "kernel")],
    ids="+".join,
)
def test_outputs_are_those_of_the_sum_of_all_updates(names):
    model, reference = mixed(*names).eval(), tiny.base("fp32").double().eval()
    for name in names:
        for key, delta in delta_of(name).items():
            reference.get_submodule(key).weight.data += delta
    torch.testing.assert_close(model(IDS).logits.double(), reference(IDS).logits, rtol=1e-4, atol=1e-4)
    for name in names:
        model.set_adapter(name)
        alone = fill(get_peft_model(tiny.base("fp32"), CONFIGS[name](), name), name).eval()
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, tiny.base("fp32").eval()(IDS).logits)


@pytest.mark.parametrize("names", [("sparse", "lora"), ("lora", "sparse")], ids="+".join)
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_both_train_and_the_support_moves(names, kind, tmp_path):
    base = tiny.base(kind)
    moving = sparse(schedule=[Regrow(every=2, grow=AccumulatedGradient(steps=1), fraction=0.5)])
    configs = {"sparse": moving, "lora": CONFIGS["lora"]()}
    model = get_peft_model(base, configs[names[0]], names[0], mixed=True)
    model.add_adapter(names[1], configs[names[1]])
    model.set_adapter(list(names))
    start = {layer.module_name: layer.units("sparse").clone() for layer in adapter_layers(model)}
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    assert {key.rpartition(".")[2] for key in before if "sparse_lora" in key} == {"sparse"}
    assert any("lora_A.lora" in key for key in before)
    tiny.train(model, tmp_path, 4, callbacks=callbacks_for(model))
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[key], value) for key, value in before.items())
    assert all(not torch.equal(layer.units("sparse"), start[layer.module_name]) for layer in adapter_layers(model))


@pytest.mark.parametrize("names", [("sparse", "lora"), ("lora", "sparse"), ("sparse", "kernel", "lora")], ids="+".join)
def test_each_adapter_is_saved_as_from_a_model_of_its_own(names, tmp_path):
    model = mixed(*names).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    for name in names:
        alone = fill(get_peft_model(tiny.base("fp32"), CONFIGS[name](), name), name).eval()
        alone.save_pretrained(tmp_path / "alone")
        one, other = (load_file(tmp_path / way / name / "adapter_model.safetensors") for way in ("", "alone"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        again = PeftModel.from_pretrained(tiny.base("fp32"), tmp_path / name).eval()
        assert torch.equal(again(IDS).logits, alone(IDS).logits)
    check_adapter(tmp_path / "sparse")
    for order in (names, names[::-1]):
        loaded = PeftMixedModel.from_pretrained(tiny.base("fp32"), tmp_path / order[0], order[0])
        for name in order[1:]:
            loaded.load_adapter(tmp_path / name, name)
        loaded.set_adapter(list(order))
        torch.testing.assert_close(loaded.eval()(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    model.load_adapter(tmp_path / "sparse", "sparse")  # into the adapter that is there, inside of others' layers
    assert torch.equal(model.eval()(IDS).logits, expected)


@pytest.mark.parametrize("names", [("sparse", "lora"), ("lora", "sparse")], ids="+".join)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_merging_and_unmerging_gives_the_base_back(names, kind):
    model = mixed(*names, base=tiny.base(kind)).eval()
    shared = [key for key, _ in tiny.base(kind).named_parameters() if "q_proj" in key or "down_proj" in key]

    def weights():
        found = {k.replace(".base_layer", "").removeprefix("base_model.model."): p for k, p in model.named_parameters()}
        return {key: found[key].detach().clone() for key in shared}

    start, expected = weights(), model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.merge_adapter(["sparse"])
        model.base_model.merge_adapter(["lora"])
    near = {"rtol": 1e-4, "atol": 1e-4} if kind == "fp32" else {"rtol": 0.3, "atol": 0.3}
    if kind != "nf4":  # whose grid rounds such updates away
        torch.testing.assert_close(model(IDS).logits, expected, **near)
    assert any(not torch.equal(value, start[key]) for key, value in weights().items())
    model.base_model.unmerge_adapter()
    assert all(torch.equal(value, start[key]) for key, value in weights().items())
    if kind != "nf4":  # peft itself takes LoRA out of other weights, v_proj's, by subtraction
        torch.testing.assert_close(model(IDS).logits, expected, **near)


def test_disabling_and_switching_while_merged_gives_the_base_back():
    for names in (("sparse", "lora"), ("lora", "sparse")):
        model, plain = mixed(*names).eval(), tiny.base("fp32").eval()
        model.base_model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)
        model.base_model.merge_adapter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.set_adapter("sparse")
        alone = fill(get_peft_model(tiny.base("fp32"), sparse(), "sparse"), "sparse").eval()
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [("sparse", "lora"), ("lora", "sparse")], ids="+".join)
def test_merged_and_unloaded_it_is_the_plain_model_with_the_sum(names):
    model = mixed(*names).eval()
    expected = model(IDS).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert plain.state_dict().keys() == tiny.base("fp32").state_dict().keys()


def test_a_broken_adapter_merges_nothing():
    model = mixed("lora", "sparse").eval()
    start = [p.clone() for key, p in model.named_parameters() if key.endswith("base_layer.weight")]
    adapter_layers(model)[-1].sparse_lora_values["sparse"].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.base_model.merge_adapter(safe_merge=True)
    now = [p for key, p in model.named_parameters() if key.endswith("base_layer.weight")]
    assert all(torch.equal(one, other) for one, other in zip(start, now, strict=True))
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    model = mixed("lora", "sparse")
    model.save_pretrained(tmp_path, selected_adapters=["sparse"])
    file = tmp_path / "sparse" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(key for key in tensors if key.endswith("_A"))][0, 0] = float("nan")
    save_checked(tensors, file, {"format": "pt"})
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="not finite"):
        model.load_adapter(tmp_path / "sparse", "second")
    assert [name for name, _ in model.named_modules()] == modules
    assert "second" not in model.peft_config
    base = tiny.base("fp32")
    with pytest.raises(ValueError, match="not finite"):
        PeftMixedModel.from_pretrained(base, tmp_path / "sparse", "sparse")
    assert [n for n, _ in base.named_modules()] == [n for n, _ in tiny.base("fp32").named_modules()]


def test_an_adapter_that_is_deleted_leaves_the_other_as_it_was():
    for gone, stays in (("lora", "sparse"), ("sparse", "lora")):
        model = mixed("lora", "sparse").eval()
        model.delete_adapter(gone)
        assert set(model.peft_config) == {stays}
        alone = fill(get_peft_model(tiny.base("fp32"), CONFIGS[stays](), stays), stays).eval()
        model.set_adapter(stays)
        torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_had_is_refused_by_name():
    model = mixed("lora")
    before = [name for name, _ in model.named_modules()]
    for options, message in (
        ({"bias": "all"}, "bias='all' cannot be had in a mixed model"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters=.*cannot be had in a mixed model"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_adapter("sparse", sparse(**options))
        assert [name for name, _ in model.named_modules()] == before
        assert set(model.peft_config) == {"lora"}
    with pytest.raises(ValueError, match="another tuner"):
        merge_to_dense(mixed("lora", "sparse"), adapter_names=["sparse"])


def test_dead_units_are_not_counted_as_trained():
    model = mixed("lora", "sparse")
    full = model.get_nb_trainable_parameters()[0]
    held = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert full == held
    layer = adapter_layers(model)[0]
    layer.write_support("sparse", layer.units("sparse")[:-3])
    assert model.get_nb_trainable_parameters()[0] == full - 3
    assert (
        get_peft_model_state_dict(model, adapter_name="lora").keys()
        == get_peft_model_state_dict(get_peft_model(tiny.base("fp32"), CONFIGS["lora"]())).keys()
    )
