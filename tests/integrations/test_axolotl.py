"""The axolotl plugin, against a stand-in of axolotl's interface with the signatures of its `integrations/base.py`."""

import dataclasses
import importlib
import inspect
import sys
import types

import pytest
import tiny
import torch
from transformers import LlamaForSequenceClassification, Trainer

from hf_sparse_peft.integrations import axolotl as plugin_module
from hf_sparse_peft.tuners import adapter_layers

HOOKS = {
    "register": ["cfg"],
    "get_input_args": [],
    "get_training_args_mixin": [],
    "get_adapter_capabilities": [],
    "get_lora_config_kwargs": ["cfg"],
    "load_adapter": ["model", "cfg", "inference", "config_only"],
    "pre_model_load": ["cfg"],
    "post_model_load": ["cfg", "model"],
    "get_trainer_cls": ["cfg"],
    "post_trainer_create": ["cfg", "trainer"],
    "create_optimizer": ["cfg", "trainer"],
    "create_lr_scheduler": ["cfg", "trainer", "optimizer", "num_training_steps"],
    "add_callbacks_pre_trainer": ["cfg", "model"],
    "add_callbacks_post_trainer": ["cfg", "trainer"],
    "post_train": ["cfg", "model"],
}
"""Parameters of the hooks of axolotl's `BasePlugin`, by name."""


@dataclasses.dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


@pytest.fixture
def plugin(monkeypatch):
    """The plugin as axolotl's `load_plugin` makes it."""
    base = types.ModuleType("axolotl.integrations.base")

    def hook(name, names):
        exec(f"def {name}(self, {', '.join(f'{one}=None' for one in names)}): return None", scope := {})
        return scope[name]

    base.BasePlugin = type("BasePlugin", (), {name: hook(name, names) for name, names in HOOKS.items()})
    base.AdapterCapabilities = AdapterCapabilities
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    plugin_module._plugin.cache_clear()
    made = importlib.import_module("hf_sparse_peft.integrations.axolotl").SparsePeftPlugin()
    assert isinstance(made, base.BasePlugin)
    yield made
    plugin_module._plugin.cache_clear()


class Cfg(dict):
    """None for what is not there, as axolotl's DictDefault; nested dicts are such too."""

    def __init__(self, **options):
        super().__init__({k: Cfg(**v) if isinstance(v, dict) else v for k, v in options.items()})

    def __missing__(self, key):
        return None

    __getattr__ = dict.get


def cfg(**options):
    block = {"r": 2, "density": 0.1, "target_modules": ["q_proj", "down_proj"]}
    return Cfg(**{"adapter": "sparse_lora", "sparse_peft": block, **options})


def test_hooks_take_what_axolotl_passes(plugin):
    for name, names in HOOKS.items():
        own = inspect.signature(getattr(plugin, name))
        own.bind(**dict.fromkeys(names))  # axolotl passes by name and by place
        own.bind(*[None] * len(names))
    assert {one.name for one in plugin.get_adapter_capabilities()} == {"sparse_lora", "kernel_lora", "spectral_lora"}
    assert not any(one.lora_like for one in plugin.get_adapter_capabilities())
    module, _, name = plugin.get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(sparse_peft={"r": 8}).sparse_peft == {"r": 8}
    assert arguments().sparse_peft is None


def test_nothing_of_axolotl_is_imported_before_it_asks():
    assert "axolotl" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="axolotl"):
        plugin_module.SparsePeftPlugin
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        plugin_module.Other


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_run_by_axolotls_order_of_calls_moves_supports_with_its_optimizer(plugin, kind, tmp_path):
    rule = {"type": "regrow", "every": 2, "fraction": 0.5, "grow": {"type": "accumulated_gradient", "steps": 1}}
    block = {"r": 0, "density": 0.1, "schedule": [rule], "optimizer": {"type": "aged_adamw"}}
    options = cfg(sparse_peft=block, lora_target_modules=["q_proj"])
    model, config = plugin.load_adapter(tiny.base(kind, layers=1), options, inference=False, config_only=False)
    assert config is model.peft_config["default"]
    assert config.target_modules == {"q_proj"}
    assert config.task_type == "CAUSAL_LM"
    start = [layer.units("default").clone() for layer in adapter_layers(model)]
    trainer = Trainer(model=model, args=tiny.arguments(tmp_path, 4), train_dataset=tiny.TokenData())
    plugin.post_trainer_create(options, trainer)
    assert type(trainer.optimizer).__name__ == "AgedAdamW"
    for callback in plugin.add_callbacks_post_trainer(options, trainer):
        trainer.add_callback(callback)
    trainer.train()
    assert all(not torch.equal(a, b.units("default")) for a, b in zip(start, adapter_layers(model), strict=True))
    model.save_pretrained(tmp_path / "saved")
    again, _ = plugin.load_adapter(tiny.base(kind, layers=1), cfg(lora_model_dir=str(tmp_path / "saved")))
    assert torch.equal(again.eval()(torch.ones(1, 4).long()).logits, model.eval()(torch.ones(1, 4).long()).logits)
    assert any(p.requires_grad for p in again.parameters())


def test_a_config_alone_for_trainers_that_add_the_adapter_and_a_task_by_the_model(plugin):
    model, config = plugin.load_adapter(tiny.llama(layers=1), cfg(), config_only=True)
    assert model is None
    assert config.r == 2
    classifier = tiny.llama(LlamaForSequenceClassification, layers=1, num_labels=2)
    assert plugin.load_adapter(classifier, cfg(), config_only=True)[1].task_type == "SEQ_CLS"
    method = cfg(sparse_peft={"method": "rigl", "density": 0.02}, lora_target_linear=True)
    found = plugin.load_adapter(tiny.llama(layers=1), method, config_only=True)[1]
    assert found.rule_types == ["regrow"]
    assert found.target_modules == "all-linear"
    assert plugin.load_adapter(tiny.llama(layers=1), Cfg(adapter="lora")) is None
    assert plugin.add_callbacks_post_trainer(Cfg(adapter="lora"), None) == []
    assert plugin.create_optimizer(Cfg(adapter=None), None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_peft": None}, "sparse_peft:.*None"),
        ({"lora_r": 8}, "lora_r=8 is an option of axolotl's LoRA"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"sparse_peft": {"rank": 8}}, r"sparse_peft: .*rank"),
        ({"sparse_peft": {"density": "1e-2"}}, r"density='1e-2'"),
        ({"sparse_peft": {"method": "lora-xs"}}, "method: lora-xs is an adapter of type spectral_lora"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused_by_name(plugin, options, message):
    model = tiny.llama(layers=1)
    with pytest.raises((ValueError, TypeError), match=message):
        plugin.load_adapter(model, cfg(**options))
    assert not adapter_layers(model)
