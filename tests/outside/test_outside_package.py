"""A package of 60 lines registers a score, a rule, a tuner and a method; everything else works without a line of it."""

import json
from pathlib import Path

import processes
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_sparse_peft import callbacks_for, hub, methods
from hf_sparse_peft.tuners import adapter_layers

TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
IDS = torch.arange(12)[None]


def adapted(outside, kind: str, base: str = "fp32"):
    config = methods.get("far-shrink", **TARGETS).config if kind == "method" else None
    config = config or outside.CoreConfig(r=3, schedule=[outside.Shrink(0.05)], **TARGETS)
    model = tiny.base(base)
    torch.manual_seed(1)
    return get_peft_model(model, config)


def train(model, out, steps=4, **options):
    return tiny.train(model, out, steps, callbacks=callbacks_for(model), **options)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "_lora_" in name}


def test_the_package_has_sixty_lines(outside):
    lines = Path(outside.__file__).read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 60


def test_the_score_chooses_the_support_of_the_method(outside):
    model = adapted(outside, "method")
    layer = adapter_layers(model)[0]
    weight = layer.dense_base_weight().double()
    distance = (weight - weight.mean()).abs().reshape(-1)
    units = layer.units("default").long()
    assert set(units.tolist()) == set(distance.topk(units.numel()).indices.tolist())
    assert model.peft_config["default"].criterion in ("far_from_mean", outside.FarFromMean())


@pytest.mark.parametrize("kind", ["method", "tuner"])
def test_a_rule_of_somebody_else_acts_and_resumes_to_the_bit(outside, kind, tmp_path):
    whole = adapted(outside, kind)
    train(whole, tmp_path / "whole", 6)
    half = adapted(outside, kind)
    train(half, tmp_path / "half", 6, save_strategy="steps", save_steps=3)
    state = {k: v for k, v in tensors(half).items() if "rule_" in k}
    assert not state  # dropped when the last step was done
    resumed = adapted(outside, kind)
    train(resumed, tmp_path / "half", 6, resume=str(tmp_path / "half" / "checkpoint-3"))
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(resumed)[name]), name
    saved = tmp_path / "half" / "checkpoint-3"
    counts = [v for k, v in load_file(saved / "adapter_model.safetensors").items() if k.endswith("rule_shrunk")]
    assert counts
    assert all(int(count) == 3 for count in counts)


def test_the_pull_is_the_one_of_its_formula(outside, tmp_path):
    model = adapted(outside, "tuner")
    with torch.no_grad():
        for layer in adapter_layers(model):
            layer.core_lora_core["default"].fill_(1.0)
    train(model, tmp_path, 3, learning_rate=0.0, weight_decay=0.0)
    for layer in adapter_layers(model):
        assert torch.allclose(layer.core_lora_core["default"], torch.full((3,), 0.95**3))


@pytest.mark.parametrize("base", ["fp32", "nf4", "conv1d"])
def test_the_tuner_saves_loads_merges_checks_and_leaves_as_plain_lora(outside, base, tmp_path):
    if base == "conv1d":
        config = outside.CoreConfig(r=3, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(tiny.base(base), config)
    else:
        model = adapted(outside, "tuner", base)
    train(model, tmp_path / "run", learning_rate=0.1)
    model.save_pretrained(tmp_path / "adapter")
    trained = logits(model)
    with model.disable_adapter():
        assert not torch.equal(logits(model), trained)
    loaded = PeftModel.from_pretrained(tiny.base(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded), trained)
    assert hub.check_adapter(tmp_path / "adapter").modules
    errors = hub.export_lora(loaded, tmp_path / "lora").errors
    assert set(errors.values()) == {0.0}
    if base != "nf4":
        as_lora = PeftModel.from_pretrained(tiny.base(base), tmp_path / "lora")
        assert torch.allclose(logits(as_lora), trained, rtol=1e-4, atol=1e-5)
        loaded.merge_adapter()
        assert torch.allclose(logits(loaded), trained, rtol=1e-4, atol=1e-5)
        loaded.unmerge_adapter()
    assert torch.equal(logits(loaded), trained)
    assert "core_lora" in str(hub.adapter_card(loaded))


def test_the_update_is_the_product_of_its_declaration(outside):
    model = adapted(outside, "tuner")
    layer = next(module for module in model.modules() if isinstance(module, outside.CoreLinear))
    with torch.no_grad():
        layer.core_lora_core["default"].normal_()
    A, B, g = (getattr(layer, f"core_lora_{name}")["default"].double() for name in ("A", "B", "core"))
    delta = (B * g) @ A
    assert torch.allclose(layer.get_delta_weight("default").double(), delta, atol=1e-6)
    x = torch.randn(5, layer.in_features)
    expected = x.double() @ (layer.dense_base_weight().double() + delta).t()
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)


WITHOUT = """
import sys, torch, tiny, hf_sparse_peft
from peft import PeftModel
from safetensors.torch import save_file
folder = sys.argv[1]
model = PeftModel.from_pretrained(tiny.llama(), folder, is_trainable=True)
with torch.no_grad():
    scores = model.eval()(input_ids=torch.arange(12)[None]).logits
    save_file({"logits": scores.contiguous()}, folder + "/logits.safetensors")
model.save_pretrained(folder + "/again")
try:
    tiny.train(model, folder + "/run", 1, callbacks=hf_sparse_peft.callbacks_for(model))
except ValueError as error:
    print(error)
"""


def test_without_the_package_the_adapter_works_is_saved_again_and_refuses_to_train(outside, tmp_path):
    method = methods.get("far-shrink", criterion="magnitude", **TARGETS)
    model = get_peft_model(tiny.llama(), method.config)
    train(model, tmp_path / "run")
    model.peft_config["default"].training_finished = False
    model.save_pretrained(tmp_path / "adapter")
    done = processes.python("-c", WITHOUT, tmp_path / "adapter", cwd=Path(tiny.__file__).parent, check=True)
    assert "schedule[0]=" in done.stdout
    assert "'shrink' is not registered" in done.stdout
    assert torch.equal(load_file(tmp_path / "adapter" / "logits.safetensors")["logits"], logits(model))
    before, after = (
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("adapter", "adapter/again")
    )
    assert before["schedule"] == after["schedule"] == [{"type": "shrink"}]
