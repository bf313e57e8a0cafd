"""Adapters of this package in axolotl's configs, through its plugin interface (`axolotl.integrations.base`).

    plugins:
      - hf_sparse_peft.integrations.axolotl.SparsePeftPlugin
    adapter: sparse_lora                # or kernel_lora, spectral_lora
    sparse_peft:
      r: 8                              # the options of the adapter's config, as adapter_config.json has them,
      density: 0.005
      target_modules: all-linear
    #  method: spiel-ag                 # or a method by name, with its options

`lora_target_modules`, `lora_target_linear`, `lora_target_parameters`, `lora_modules_to_save`, `lora_model_dir` and
`peft_autocast_adapter_dtype` mean what they do for LoRA. Rules of the schedule and the optimizer that the config asks
for are brought along. axolotl is imported when it asks for `SparsePeftPlugin`, not before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from .. import methods
from ..training import callbacks_for, make_optimizer, trainer_class_for
from ..tuners import KernelLoraConfig, SparseLoraConfig, SpectralLoraConfig

ADAPTERS: dict[str, type[PeftConfig]] = {
    config.tuner: config for config in (SparseLoraConfig, KernelLoraConfig, SpectralLoraConfig)
}
"""What `adapter:` may name."""

_TASKS = {"SequenceClassification": TaskType.SEQ_CLS, "TokenClassification": TaskType.TOKEN_CLS}
_SHARED = {
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "exclude_modules": "lora_exclude_modules",
    "layers_to_transform": "peft_layers_to_transform",
    "layers_pattern": "peft_layers_pattern",
}
"""Option of our configs -> axolotl's, taken where `sparse_peft` does not set it."""
_OTHERS = ("lora_r", "lora_alpha", "lora_dropout", "peft_use_dora", "peft_use_rslora", "loraplus_lr_ratio", "relora")
"""Options of axolotl's that say something of a LoRA, and nothing of our adapters."""


def adapter_config(cfg: Mapping[str, Any], model: nn.Module) -> PeftConfig:
    """The config that axolotl's `cfg` asks for on `model`.

    Raises:
        ValueError: `sparse_peft` is missing or has an unknown option, or axolotl's options of a LoRA are set, which
            would have no effect; names the option.
    """
    adapter, options = cfg["adapter"], cfg.get("sparse_peft")
    if not isinstance(options, Mapping) or not options:
        raise ValueError(
            f"adapter: {adapter} takes its options from a block sparse_peft:, and it is {options!r}. Write e.g. "
            "sparse_peft: {r: 8, density: 0.005, target_modules: all-linear}."
        )
    for name in _OTHERS:
        if cfg.get(name):
            raise ValueError(
                f"{name}={cfg.get(name)!r} is an option of axolotl's LoRA and has no effect on adapter: {adapter}. Set "
                "what you mean under sparse_peft: (r, lora_alpha, lora_dropout, ...), and leave it out."
            )
    options = _plain(options)
    if cfg.get("lora_target_linear"):
        options.setdefault("target_modules", "all-linear")
    for own, theirs in _SHARED.items():
        if cfg.get(theirs):
            options.setdefault(own, _plain(cfg.get(theirs)))
    options.setdefault("task_type", _task_of(model))
    method = options.pop("method", None)
    if method is not None:
        config = methods.get(method, **options).config
        if config.peft_type.value.lower() != adapter:
            raise ValueError(
                f"method: {method} is an adapter of type {config.peft_type.value.lower()}, and adapter: {adapter}."
            )
        return config
    try:
        return ADAPTERS[adapter](**options)
    except TypeError as error:
        raise ValueError(f"sparse_peft: {error}. See help({ADAPTERS[adapter].__name__}) for the options.") from error


class SparsePeftHooks:
    """What `SparsePeftPlugin` does; the plugin itself is made of this and axolotl's `BasePlugin`."""

    def get_input_args(self) -> str:
        """The pydantic model of the block `sparse_peft`."""
        return f"{__name__}.SparsePeftArgs"

    def get_adapter_capabilities(self) -> list[Any]:
        """`AdapterCapabilities` of every adapter; none is LoRA-like, so that axolotl does not load one as a LoRA."""
        from axolotl.integrations.base import AdapterCapabilities

        return [AdapterCapabilities(name=name) for name in ADAPTERS]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Mapping[str, Any], inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig | None] | None:
        """`model` with the adapter, and its config; None for adapters of others. With `config_only`, as for DPO and
        KTO, whose trainers add the adapter, no model."""
        if cfg.get("adapter") not in ADAPTERS:
            return None
        config = adapter_config(cfg, model)
        if config_only:
            return None, config
        cast = cfg.get("peft_autocast_adapter_dtype")
        options = {} if cast is None else {"autocast_adapter_dtype": cast}
        if cfg.get("lora_model_dir"):
            adapted = PeftModel.from_pretrained(model, cfg["lora_model_dir"], is_trainable=not inference, **options)
        else:
            adapted = get_peft_model(model, config, **options)
        return adapted, adapted.peft_config["default"]

    def add_callbacks_post_trainer(self, cfg: Mapping[str, Any], trainer: Trainer) -> list[TrainerCallback]:
        """The callbacks that carry out the adapter's schedule.

        Raises:
            ValueError: the config needs a Trainer of its own, which axolotl's is not.
        """
        if cfg.get("adapter") not in ADAPTERS:
            return []
        needed = trainer_class_for(trainer.model)
        if not isinstance(trainer, needed):
            raise ValueError(
                f"The config under sparse_peft: trains with {needed.__name__} only, and axolotl's trainer is a "
                f"{type(trainer).__name__}. Leave out the rule or optimizer that needs it, or train without axolotl."
            )
        return callbacks_for(trainer.model)

    def create_optimizer(self, cfg: Mapping[str, Any], trainer: Trainer) -> torch.optim.Optimizer | None:
        """The optimizer that the adapter's config asks for; None: axolotl's."""
        return make_optimizer(trainer.model, trainer.args) if cfg.get("adapter") in ADAPTERS else None

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Trainer) -> None:
        """Give the trainer that optimizer."""
        if trainer.optimizer is None:
            trainer.optimizer = self.create_optimizer(cfg, trainer)


@functools.cache
def _plugin() -> type:
    from axolotl.integrations.base import BasePlugin

    return type("SparsePeftPlugin", (SparsePeftHooks, BasePlugin), {"__module__": __name__, "__doc__": __doc__})


@functools.cache
def _arguments() -> type:
    from pydantic import Field, create_model

    block = (dict[str, Any] | None, Field(default=None, description="Options of an adapter of hf_sparse_peft."))
    return create_model("SparsePeftArgs", __module__=__name__, sparse_peft=block)


def __getattr__(name: str) -> Any:
    if name == "SparsePeftPlugin":
        return _plugin()
    if name == "SparsePeftArgs":
        return _arguments()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _task_of(model: nn.Module) -> TaskType:
    name = type(model).__name__
    return next((task for part, task in _TASKS.items() if part in name), TaskType.CAUSAL_LM)


def _plain(value: Any) -> Any:
    """Dicts and lists in place of axolotl's own kinds of them."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
