"""What a run's settings must not be for callbacks to do their work, said before the first step."""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from ..rules import Rule
from ..tuners import adapter_layers
from ..tuners.shared.best_model import warn_of_best_model

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


class NamedAdapterCallback(TrainerCallback):
    """Says at the start of a run what Trainer does for an adapter called 'default' only."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Warn where `load_best_model_at_end` will not load the best state."""
        warn_of_best_model(args, state, model)


def why_no_rule_runs(callback: str, rule: Rule | type[Rule], model: nn.Module) -> str:
    """The message for a runner that found no trained adapter with a rule of a class, or for the `rule` it was given."""
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
    start = f"{callback} found no trained adapter " + (f"for {what}" if given else f"whose schedule has {what}")
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
    return (
        f"{start}. Set schedule in its config, or leave the callback out (callbacks_for(model) picks the right ones)."
    )
