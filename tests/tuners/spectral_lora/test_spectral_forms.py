"""Every form of a spectral adapter under peft's contract: several adapters, bases, files, heads, training."""

import warnings
from dataclasses import dataclass

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spectral_forms import FORMS, RULED, TARGETS, adapted, config_of, deltas, fill, logits
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import callbacks_for, hub, register_part
from hf_sparse_peft.tuners.spectral_lora import Bases, Core, spectral_layers
from hf_sparse_peft.utils.tensors import TensorSpec


@register_part("alternating")
@dataclass(frozen=True)
class Alternating(Bases):
    """Signs that alternate with the position's bits, of which nothing is stored."""

    def specs(self, site):
        return []

    def factors(self, tensors, site):
        signs = torch.tensor(
            [[(-1.0) ** ((at >> k) & 1) for at in range(site.rows + site.cols)] for k in range(site.r)]
        )
        return signs[:, : site.rows].t(), signs[:, site.rows :] * 0.1


@register_part("symmetric")
@dataclass(frozen=True)
class Symmetric(Core):
    """C + C^T of a trained C that starts at 0."""

    def specs(self, a, b, site):
        return [TensorSpec("spectral_lora_core", (a, b), space="core")]

    def matrix(self, tensors):
        return tensors["spectral_lora_core"] + tensors["spectral_lora_core"].t()


EVERY_FORM = pytest.mark.parametrize("form", FORMS)


@EVERY_FORM
def test_adapters_add_up_and_one_leaves_without_a_trace(form):
    model = adapted(form)
    alone = logits(model)
    torch.manual_seed(2)
    model.add_adapter("other", config_of(form, seed=5))
    fill(model, "other", seed=50)
    assert torch.equal(logits(model), alone)
    model.base_model.set_adapter(["default", "other"])
    first, second = deltas(model), deltas(model, "other")
    for layer in spectral_layers(model):
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
        update = (first[layer.module_name] + second[layer.module_name]).double()
        expected = layer.base_layer(x).double() + x.double() @ update.t()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
        assert min(first[layer.module_name].abs().max(), second[layer.module_name].abs().max()) > 1e-4
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), alone)
    assert not any("other" in key for key in model.state_dict())
    assert all(
        "other" not in held
        for layer in spectral_layers(model)
        for held in vars(layer).values()
        if isinstance(held, dict)
    )


@EVERY_FORM
def test_it_is_merged_for_good_and_taken_off(form):
    model = adapted(form)
    before, plain = logits(model), logits(tiny.base())
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(adapted(form).unload()), plain)


@EVERY_FORM
@pytest.mark.parametrize("base", ["bf16", "nf4", "conv1d"])
def test_layers_answer_with_base_plus_update_on_every_base(form, base):
    targets = ["c_attn", "c_proj"] if base == "conv1d" else TARGETS
    model = adapted(form, base, target_modules=targets)
    found, dtype = deltas(model), torch.bfloat16 if base == "bf16" else torch.float32
    for layer in spectral_layers(model)[:4]:
        x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = layer.base_layer(x).double() + x.double() @ found[layer.module_name].double().t()
        tolerance = 5e-2 if base == "bf16" else 1e-4
        torch.testing.assert_close(layer(x).double(), expected, rtol=tolerance, atol=tolerance)
        assert layer(x).dtype == layer.base_layer(x).dtype


@EVERY_FORM
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_named_adapter_loads_to_the_same_bits_under_another_name(form, low_memory, tmp_path):
    model = adapted(form, name="mine")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny.base(), tmp_path / "mine", adapter_name="theirs", low_cpu_mem_usage=low_memory
    )
    assert torch.equal(logits(loaded), logits(model))
    report = hub.check_adapter(tmp_path / "mine")
    assert report.parameters == model.get_nb_trainable_parameters()[0]
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("mine", "again/theirs"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@EVERY_FORM
def test_transformers_own_calls_load_it(form, tmp_path):
    model = adapted(form)
    model.save_pretrained(tmp_path)
    plain = tiny.base()
    plain.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@EVERY_FORM
def test_one_config_serves_two_models_and_stays_as_it_was(form):
    config = config_of(form)
    before = config.to_dict()
    models = [get_peft_model(tiny.llama(layers=layers), config) for layers in (1, 3)]
    assert config.to_dict() == before
    assert [len(spectral_layers(model)) for model in models] == [3, 9]
    assert all(torch.isfinite(logits(model)).all() for model in models)


@EVERY_FORM
def test_an_adapter_of_anothers_own_config_starts_as_its_copy(form):
    model = adapted(form)
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that it is a copy
        model.add_adapter("twin", model.peft_config["default"])
    model.set_adapter("twin")
    assert torch.equal(logits(model), before)
    fill(model, "twin", seed=70)
    assert not torch.equal(logits(model), before)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


@EVERY_FORM
def test_heads_are_saved_with_it(form, tmp_path):
    def base():
        return tiny.llama(LlamaForSequenceClassification, num_labels=3)

    model = adapted(form, base(), task_type="SEQ_CLS", modules_to_save=["score"])
    with torch.no_grad():
        model.base_model.model.score.modules_to_save["default"].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


@EVERY_FORM
def test_gradients_of_a_layer_that_runs_twice_are_the_sum_of_its_uses(form):
    model = adapted(form, target_modules=["layers.0.self_attn.q_proj"])
    (layer,) = spectral_layers(model)
    xs = [torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(at)) for at in range(2)]
    sums = []
    for uses in ((xs[0],), (xs[1],), xs):
        model.zero_grad()
        sum((layer(x) ** 2).sum() for x in uses).backward()
        sums.append([p.grad.clone() for p in layer.trained_parameters("default")])
    for one, two, both in zip(*sums, strict=True):
        scale = both.abs().max()
        torch.testing.assert_close((one + two) / scale, both / scale, rtol=0, atol=1e-5)


@EVERY_FORM
def test_masters_are_fp32_over_bf16_and_lean_ones_train_finitely(form):
    model = get_peft_model(tiny.base("bf16"), config_of(form))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lean = get_peft_model(tiny.base("bf16"), config_of(form), autocast_adapter_dtype=False)
    assert {p.dtype for p in lean.parameters() if p.requires_grad} == {torch.bfloat16}
    if FORMS[form].get("core") is not None and FORMS[form]["core"].residual is not None:
        assert not any(delta.any() for delta in deltas(lean).values())
    ids = torch.arange(24).view(2, 12)
    lean(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lean.parameters() if p.requires_grad)


def test_bases_and_a_core_of_somebody_else_train_save_and_load(tmp_path):
    model = adapted("band", bases=Alternating(), core=Symmetric())
    before = logits(model)
    tiny.train(model, tmp_path / "run", 2, callbacks=callbacks_for(model))
    assert not torch.equal(logits(model.eval()), before)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.base(), tmp_path / "adapter")), logits(model))
    assert set(hub.export_lora(model, tmp_path / "lora").ranks.values()) == {3}


# Training


@pytest.mark.parametrize("form", RULED)
def test_an_interrupted_run_gives_back_what_it_held_and_a_second_one_trains(form, tmp_path):
    model = adapted(form, schedule=[RULED[form]]).train()

    def stop(step, model, optimizer):
        if step == 4:
            raise KeyboardInterrupt

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, tmp_path, 6, callbacks=[*callbacks_for(model), tiny.At(on_step_end=stop)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tiny.train(model, tmp_path, 6, callbacks=callbacks_for(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in trained)
