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
from .replicated import average_replicated, fsdp_plugin, leave_adapters_whole

_SWITCHES = {
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}
_WRAPPERS = {"FullyShardedDataParallel": "FSDP", "FSDPModule": "FSDP2", "DeepSpeedEngine": "DeepSpeed"}

_MODEL_PARALLEL = {
    "tensor parallelism": "tp_size",
    "context parallelism": "cp_size",
    "sequence parallelism": "sp_size",
}

_CAUSES = {
    "FSDP": "version 1 flattens parameters and shards the values, so that single units cannot be told apart",
    "DeepSpeed": "it steps inside the backward pass and partitions gradients and optimizer state",
    "Megatron-LM": "it shards the values and the optimizer state",
    **dict.fromkeys(_MODEL_PARALLEL, "a rank sees a part of the weight or of the sequence"),
}
_MENDS = {
    "FSDP": "Use FSDP2 (fsdp_config={'version': 2}, FSDP_VERSION=2 or fsdp_version: 2 in accelerate's config), DDP",
}


def refuse_sharded(args: TrainingArguments, option: str, model: nn.Module | None = None) -> None:
    """Refuse a run that shards values or optimizer state, however that was switched on. FSDP2 is none: it leaves
    adapters whole (`training.replicated`).

    Raises:
        ValueError: DeepSpeed, FSDP or Megatron-LM by `TrainingArguments`, by the environment of `accelerate launch`, by
            an accelerator that exists already, or because the model is wrapped.
    """
    found = sharding_switched_on(args) or _wrapped(model)
    if found is not None and found[0] != "FSDP2":
        name, where = found
        raise ValueError(
            f"Supports and ranks cannot move under {name}: {_CAUSES[name]}. {name} is switched on by {where}. "
            f"{_MENDS.get(name, 'Train with FSDP2, DDP')} or on one device, or set {option} to None."
        )


def sharding_switched_on(args: TrainingArguments) -> tuple[str, str] | None:
    """What shards the run, "FSDP2" for FSDP of version 2, and where that was switched on; None where nothing does."""
    found = _switched_on(args)
    return None if found is None else (_with_version(found[0], args), found[1])


def _switched_on(args: TrainingArguments) -> tuple[str, str] | None:
    parallel = getattr(args, "parallelism_config", None)
    for name, field in _MODEL_PARALLEL.items():
        if (getattr(parallel, field, None) or 1) > 1:
            return name, f"TrainingArguments.parallelism_config.{field}"
    for name, field in (("DeepSpeed", "deepspeed"), ("DeepSpeed", "deepspeed_plugin"), ("FSDP", "fsdp")):
        if getattr(args, field, None):
            return name, f"TrainingArguments.{field}"
    for name, variable in _SWITCHES.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            return name, f"the environment variable {variable} (`accelerate launch` sets it from its config)"
    if getattr(parallel, "dp_shard_size", 1) > 1:
        return "FSDP", "TrainingArguments.parallelism_config"
    kind = getattr(AcceleratorState._shared_state.get("distributed_type"), "value", "")
    names = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}
    return (names[kind], "the accelerator of this process") if kind in names else None


def _with_version(name: str, args: TrainingArguments) -> str:
    """FSDP with its version: the accelerator's plugin knows it, before there is one the arguments or the environment
    do, where 1 is accelerate's default and 2 transformers'."""
    if name != "FSDP":
        return name
    config = getattr(args, "fsdp_config", None)
    if (plugin := fsdp_plugin()) is not None:
        version = plugin.fsdp_version
    elif getattr(args, "fsdp", None) and isinstance(config, dict) and not config.get("xla"):
        version = config.get("version", 2)
    else:
        version = os.environ.get("FSDP_VERSION", 1)
    return "FSDP2" if str(version) == "2" else "FSDP"


def _wrapped(model: nn.Module | None) -> tuple[str, str] | None:
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS:
                return _WRAPPERS[cls.__name__], f"the model, which contains a {cls.__name__}"
    return None


class RunCheckCallback(TrainerCallback):
    """Says at the start of a run what this Trainer does not do for the adapters of the model; a `RuleRunner` says it
    too."""

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        """Keep adapters whole where FSDP2 will shard the model."""
        if model is not None:
            leave_adapters_whole(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Warn of an optimizer that the config does not ask for, and where `load_best_model_at_end` will not load the
        best state."""
        average_replicated(model)
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
