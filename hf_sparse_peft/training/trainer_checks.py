"""What a run's settings must not be for callbacks to do their work, said before the first step."""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..rules import Rule
from ..tuners import adapter_layers
from ..tuners.shared.best_model import warn_of_best_model
from .optimizers import warn_of_other_optimizer

_SWITCHES = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}
_WRAPPERS = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP", "DeepSpeedEngine": "DeepSpeed"}


def refuse_sharded(args: TrainingArguments, option: str, model: nn.Module | None = None) -> None:
    """Refuse a run that shards values or optimizer state, however that was switched on.

    Raises:
        ValueError: DeepSpeed, FSDP or Megatron-LM by `TrainingArguments`, by the environment of `accelerate launch`, by
            an accelerator that exists already, or because the model is wrapped.
    """
    found = sharding_switched_on(args) or _wrapped(model)
    if found is not None:
        name, where = found
        raise ValueError(
            f"Supports and ranks cannot move under {name}: it steps inside the backward pass or shards the values, so "
            f"callbacks see no gradients and cannot edit optimizer state. {name} is switched on by {where}. Train with "
            f"DDP or on one device, or set {option} to None."
        )


def sharding_switched_on(args: TrainingArguments) -> tuple[str, str] | None:
    """What shards the run, and where that was switched on; None where nothing does."""
    for name, field in (("DeepSpeed", "deepspeed"), ("DeepSpeed", "deepspeed_plugin"), ("FSDP", "fsdp")):
        if getattr(args, field, None):
            return name, f"TrainingArguments.{field}"
    for name, variable in _SWITCHES.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            return name, f"the environment variable {variable} (`accelerate launch` sets it from its config)"
    if getattr(getattr(args, "parallelism_config", None), "dp_shard_size", 1) > 1:
        return "FSDP", "TrainingArguments.parallelism_config"
    kind = getattr(AcceleratorState._shared_state.get("distributed_type"), "value", "")
    names = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}
    return (names[kind], "the accelerator of this process") if kind in names else None


def _wrapped(model: nn.Module | None) -> tuple[str, str] | None:
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                return _WRAPPERS[cls.__name__], f"the model, which contains a {cls.__name__}"
    return None


class RunCheckCallback(TrainerCallback):
    """Says at the start of a run what this Trainer does not do for the adapters of the model; a `RuleRunner` says it
    too."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Warn of an optimizer that the config does not ask for, and where `load_best_model_at_end` will not load the
        best state."""
        check_run(args, state, model, optimizer)


def check_run(args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
    """Say, once a run, what this Trainer does not do for the adapters of `model`."""
    warn_of_best_model(args, state, model)
    if getattr(state, "_optimizer_checked", False):
        return
    state._optimizer_checked = True
    warn_of_other_optimizer(model, optimizer, "pass **hf_sparse_peft.trainer_options(model, args) to the Trainer")


def why_no_rule_runs(owner: str, rule: Rule | type[Rule], model: nn.Module) -> str:
    """The message for what runs rules (`owner`) and found no trained adapter with a rule of a class, or for the `rule`
    that it was given."""
    given, rule_class = isinstance(rule, Rule), rule if isinstance(rule, type) else type(rule)
    asking = {
        name: config
        for layer in adapter_layers(model)
        for name, config in layer.adapter_configs.items()
        if given or any(isinstance(one, rule_class) for one in config.schedule)
    }
    active = {name for layer in adapter_layers(model) for name in layer.active_adapters}
    frozen = [name for name, config in asking.items() if name in active and config.inference_mode]
    what = "a rule" if rule_class.__name__ == "Rule" else rule_class.__name__
    start = f"{owner} found no trained adapter " + (f"for {what}" if given else f"whose schedule has {what}")
    if frozen:
        return (
            f"{start}: '{frozen[0]}' is frozen, because it was loaded with is_trainable=False (peft's default). Load "
            "it with PeftModel.from_pretrained(base, path, is_trainable=True)."
        )
    if asking and not active & set(asking):
        name = next(iter(asking))
        return f"{start}: that of '{name}' has, and is not active. Call model.set_adapter('{name}') before training."
    if given:
        return f"{start}: it acts on units of {sorted(rule.acts_on)}, and no trained layer has any."
    if asking:
        name = next(iter(active & set(asking)))
        return (
            f"{start}: that of '{name}' has, and requires_grad is False for the parameters that it acts on. Call "
            f"model.set_adapter('{name}'), or set requires_grad=True for them, before training."
        )
    way_out = (
        "train without a Controller"
        if owner == "Controller"
        else "leave the callback out (callbacks_for(model) picks the right ones)"
    )
    return f"{start}. Set schedule in its config, or {way_out}."
