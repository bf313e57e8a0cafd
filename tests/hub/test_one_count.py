"""Card, checked file and `print_trainable_parameters` say one number of an adapter."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import Allocate, AverageRank, KernelLoraConfig, SparseLoraConfig, SpectralLoraConfig, hub
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared.counts import adapter_counts

TARGETS = {"target_modules": ["q_proj", "down_proj"]}


def biased():
    return tiny.llama(layers=1, attention_bias=True, mlp_bias=True)


CASES = {
    "entries": (biased, SparseLoraConfig(r=2, density=0.05, **TARGETS)),
    "rows": (biased, SparseLoraConfig(r=0, density=0.1, granularity="row", **TARGETS)),
    "biases of adapted modules": (biased, SparseLoraConfig(r=2, bias="sparse_lora_only", density=0.05, **TARGETS)),
    "all biases": (biased, SparseLoraConfig(r=2, bias="all", density=0.05, **TARGETS)),
    "heads": (biased, SparseLoraConfig(r=2, density=0.05, modules_to_save=["lm_head"], **TARGETS)),
    "heads and all biases": (
        lambda: tiny.llama(LlamaForSequenceClassification, layers=1, attention_bias=True),
        SparseLoraConfig(r=2, density=0.05, bias="all", task_type="SEQ_CLS", **TARGETS),
    ),
    "kernel": (biased, KernelLoraConfig(r=2, **TARGETS)),
    "spectral": (biased, SpectralLoraConfig(r=2, **TARGETS)),
}


@pytest.mark.parametrize("name", CASES)
def test_card_file_and_peft_agree_with_the_parameters_that_train(name, tmp_path):
    make, config = CASES[name]
    model = get_peft_model(make(), config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hub.save_adapter(model, tmp_path / "adapter")
    report = hub.check_adapter(tmp_path / "adapter")
    counts = adapter_counts(model)
    assert counts.trained == counts.living == report.parameters == model.get_nb_trainable_parameters()[0] == trained
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"An adapter of {trained:,} parameters" in card
    assert f" | {trained:,} |\n" in card
    assert f"{trained:,}" in str(report.table()).splitlines()[-1]
    assert ("heads and biases" in card) == ("heads and biases" in str(report.table())) == bool(counts.beside)
    assert adapter_counts(PeftModel.from_pretrained(make(), tmp_path / "adapter")).living == trained


def test_dead_units_are_in_none_of_them(tmp_path):
    schedule = [Allocate(budget=AverageRank(2))]
    model = get_peft_model(
        biased(), SparseLoraConfig(r=4, granularity="row", density=0.2, schedule=schedule, **TARGETS)
    )
    before = adapter_counts(model).living
    layer = adapter_layers(model)[0]
    layer.write_support("default", layer.units("default")[:-2])
    layer.sparse_lora_rank_mask["default"][1] = 0
    lost = 2 * layer.in_features + layer.in_features + layer.out_features + 1
    hub.save_adapter(model, tmp_path / "adapter")
    counts = (
        adapter_counts(model).living,
        hub.check_adapter(tmp_path / "adapter").parameters,
        model.get_nb_trainable_parameters()[0],
    )
    assert counts == (before - lost,) * 3


def test_a_base_weight_that_only_travels_along_is_not_counted(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path / "base")
    base = type(tiny.llama(layers=1)).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, SparseLoraConfig(r=2, density=0.05, **TARGETS))
    hub.save_adapter(model, tmp_path / "adapter")
    report = hub.check_adapter(tmp_path / "adapter")
    assert report.other_bytes >= 70 * 32 * 4
    assert report.parameters == adapter_counts(model).living == model.get_nb_trainable_parameters()[0]
    assert torch.is_tensor(base.lm_head.weight)
