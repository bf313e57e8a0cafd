"""What leaves the package takes heads, biases and resized embeddings along."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig, hub

IDS = torch.arange(1, 11)[None]


def base():
    return tiny.llama(LlamaForSequenceClassification, layers=1, num_labels=3, attention_bias=True)


def adapted(kind="sparse", **options):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS", **options}
    config = KernelLoraConfig(r=4, **options) if kind == "kernel" else SparseLoraConfig(**{"density": 0.1, **options})
    model = get_peft_model(base(), config, adapter_name="one")
    fill(model, 1)
    return model.eval(), config


@torch.no_grad()
def fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("to", ["lora", "shira"])
def test_an_exported_adapter_has_the_head_in_file_and_config(to, tmp_path):
    options = {"r": 0, "granularity": "row"} if to == "lora" else {"r": 0}
    model, _ = adapted(**options)
    (hub.export_lora if to == "lora" else hub.export_shira)(model, tmp_path, "one")
    head = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(head, model.base_model.model.score.modules_to_save["one"].weight)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert "score" in loaded.peft_config["default"].modules_to_save
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", ["all", "sparse_lora_only"])
def test_an_exported_lora_has_the_biases(bias, tmp_path):
    model, _ = adapted(r=2, granularity="row", bias=bias)
    hub.export_lora(model, tmp_path, "one")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="biases"):
        hub.export_shira(adapted(r=0, bias=bias)[0], tmp_path / "shira", "one")


@pytest.mark.parametrize("kind", ["sparse", "kernel"])
def test_a_dense_model_of_two_adapters_refuses_two_heads_unless_told_which(kind, tmp_path):
    model, config = adapted(kind)
    model.add_adapter("two", type(config)(**{**config.to_dict(), "peft_type": None}))
    model.set_adapter("two")
    fill(model, 2)
    heads = model.base_model.model.score.modules_to_save
    with pytest.raises(ValueError, match="'one' and 'two'"):
        hub.merge_to_dense(model, tmp_path / "dense", adapter_names=["one", "two"])
    assert not (tmp_path / "dense").exists()
    for owner in ("one", "two"):
        dense = hub.merge_to_dense(model, adapter_names=["one", "two"], modules_to_save_from=owner)
        assert torch.equal(dense.score.weight, heads[owner].weight)
    with torch.no_grad():
        heads["two"].weight.copy_(heads["one"].weight)
    assert torch.equal(hub.merge_to_dense(model, adapter_names=["one", "two"]).score.weight, heads["one"].weight)


@pytest.mark.parametrize("kind", ["sparse", "kernel"])
def test_a_dense_model_has_head_and_biases_of_its_adapter(kind):
    model, _ = adapted(kind, **({"bias": "all"} if kind == "sparse" else {}))
    torch.testing.assert_close(logits(hub.merge_to_dense(model)), logits(model), atol=1e-5, rtol=1e-5)


def test_an_adapter_that_changes_its_head_alone_is_exported_as_what_it_is(tmp_path):
    model, _ = adapted(r=2, density=0)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.sparse_lora_B["one"].zero_()
    hub.export_lora(model, tmp_path, "one")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))
