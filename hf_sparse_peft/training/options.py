"""What a Trainer must be given so that it does all that an adapter's config asks for."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..optim import OptimizerSpec
from ..tuners import adapter_layers
from ..tuners.upstream import freeze_adalora_ranks, upstream_configs
from .optimizers import asked_configs, asked_or_given, make_optimizer
from .runner import RuleRunner
from .trainer_checks import RunCheckCallback, sharding_switched_on
from .trainers import TwoPassTrainer
from .upstream_start import UpstreamStartCallback
from .zeroth_order_trainer import ZerothOrderTrainer

TRAINERS: dict[str, type[Trainer]] = {"two_passes": TwoPassTrainer, "loss_differences": ZerothOrderTrainer}
"""The Trainer that gives a rule or an optimizer what it needs (`Rule.needs`, `OptimizerSpec.needs`)."""


def callbacks_for(model_or_config: nn.Module | PeftConfig) -> list[TrainerCallback]:
    """The callbacks that carry out the schedules of a model's active adapters, or of a config, and let the training
    data decide what they wait for; often an empty list.

    Pass them to `Trainer(callbacks=...)` or `trl.SFTTrainer(peft_config=config, callbacks=callbacks_for(config))`.

    Of upstream peft's adapters AdaLoRA has a schedule, which the same runner carries out, and a LoRA with
    `init_lora_weights="eva"` or `"lora_ga"` is given its start by the training data (`UpstreamStartCallback`).

    Raises:
        TypeError: neither such a config nor a model with such an adapter.
    """
    if (found := upstream_callbacks(model_or_config)) is not None:
        return found
    if hasattr(model_or_config, "rule_types"):
        configs = [model_or_config]
    elif isinstance(model_or_config, nn.Module) and (layers := adapter_layers(model_or_config)):
        configs = [layer.adapter_configs[n] for layer in layers for n in layer.active_adapters if layer.holds(n)]
    else:
        raise TypeError(
            "callbacks_for takes a config of this package or a model that has such an adapter, not "
            f"{type(model_or_config).__name__}. Call it after get_peft_model, or pass the config."
        )
    named = False
    if isinstance(model_or_config, nn.Module):
        named = any(name != "default" for layer in layers for name in layer.active_adapters)
        waits = any(layer.awaits_calibration(name) for layer in layers for name in layer.active_adapters)
    else:
        waits = model_or_config.needs_calibration
    if waits or any(config.schedule for config in configs):
        return [RuleRunner()]
    # A RuleRunner says it too.
    return [RunCheckCallback()] if named or any(config.optimizer is not None for config in configs) else []


def upstream_callbacks(model_or_config: nn.Module | PeftConfig) -> list[TrainerCallback] | None:
    """The same for a config of upstream peft, or a model with its adapters alone; None where that is not so, or nothing
    is to be done for them."""
    if isinstance(model_or_config, nn.Module):
        configs = [] if adapter_layers(model_or_config) else list(upstream_configs(model_or_config).values())
    else:
        configs = [model_or_config]
    found: list[TrainerCallback] = []
    if any(getattr(config, "init_lora_weights", None) in ("eva", "lora_ga") for config in configs):
        found.append(UpstreamStartCallback())
    if any(isinstance(config, AdaLoraConfig) for config in configs):
        if isinstance(model_or_config, nn.Module):
            freeze_adalora_ranks(model_or_config)  # before anything wraps the model
        found.append(RuleRunner())
    return found or None


def trainer_class_for(model_or_config: nn.Module | PeftConfig, optimizer: OptimizerSpec | None = None) -> type[Trainer]:
    """The Trainer class that a config, or the active adapters of a model, need; most work in any Trainer.

    Args:
        model_or_config: as `trainer_options` takes it.
        optimizer: as `trainer_options` takes it.

    Raises:
        ValueError: parts of the config need different ones; see `optimizer_spec` too.
    """
    spec = asked_or_given(model_or_config, optimizer)
    needs = set() if spec is None else set(spec.needs)
    for config in asked_configs(model_or_config):
        for rule in getattr(config, "rules", []):
            needs |= rule.all_needs
    classes = {TRAINERS[need] for need in needs & set(TRAINERS)}
    if len(classes) > 1:
        raise ValueError(
            f"The config needs {' and '.join(sorted(cls.__name__ for cls in classes))} at once, and a run has one "
            "Trainer. Take the rule or the optimizer that needs one of them out."
        )
    return classes.pop() if classes else Trainer


def trainer_options(
    model_or_config: nn.Module | PeftConfig,
    args: TrainingArguments,
    trainer_class: type[Trainer] = Trainer,
    optimizer: OptimizerSpec | None = None,
) -> dict[str, Any]:
    """Arguments for a Trainer: `args`, the callbacks and, where the config asks for one, the optimizer.

        Trainer(model=model, train_dataset=data, **trainer_options(model, args))
        trl.SFTTrainer(base, train_dataset=data, peft_config=config, **trainer_options(config, args))

    The optimizer is built from the adapted model when the Trainer needs it (`optimizer_cls_and_kwargs`), so that a
    config is enough where the Trainer makes the adapter itself. A model whose own weights train, or with adapters of
    upstream peft alone, takes one of this package's too:

        Trainer(model=model, train_dataset=data, **trainer_options(model, args, optimizer=ProjectedAdamWSpec()))

    Args:
        model_or_config: an adapted model, or a config of this package; with `optimizer`, any model.
        args: the Trainer's; its learning rate, weight decay, betas, epsilon and seed are the optimizer's.
        trainer_class: what will be given the options. A few configs need one of their own,
            `trainer_class_for(model_or_config)`, or a subclass of that.
        optimizer: a part such as `ProjectedAdamWSpec()`, where no config asks for one.

    Raises:
        ValueError: `trainer_class` is not the one that the config needs; an optimizer that is unknown here.
        TypeError: neither a config of this package nor a model with one of its adapters, and no `optimizer`.
    """
    spec = asked_or_given(model_or_config, optimizer)
    plain = optimizer is not None and not _has_own(model_or_config)
    callbacks = (upstream_callbacks(model_or_config) or []) if plain else callbacks_for(model_or_config)
    needed = trainer_class_for(model_or_config, optimizer)
    if not issubclass(trainer_class, needed):
        raise ValueError(
            f"This config trains with {needed.__name__}, not with {trainer_class.__name__}: take cls = "
            "hf_sparse_peft.trainer_class_for(model), and cls(model=model, **trainer_options(model, args, cls))."
        )
    if not callbacks and sharding_switched_on(args) is not None:
        callbacks = [RunCheckCallback()]  # which keeps adapters whole under FSDP2
    options: dict[str, Any] = {"args": args, "callbacks": callbacks}
    if spec is not None:
        options["optimizer_cls_and_kwargs"] = (_Factory(args, optimizer), {})
    return options


def _has_own(model_or_config: nn.Module | PeftConfig) -> bool:
    if isinstance(model_or_config, nn.Module):
        return bool(adapter_layers(model_or_config))
    return hasattr(model_or_config, "rule_types")


class _Factory:
    """What Trainer takes for a factory: called without arguments it gives what is called with the model."""

    def __init__(self, args: TrainingArguments, spec: OptimizerSpec | None = None) -> None:
        self.args, self.spec = args, spec

    def __call__(self) -> Any:
        return self._build

    def _build(self, model: nn.Module) -> torch.optim.Optimizer:
        built = make_optimizer(model, self.args, spec=self.spec)
        if built is None:
            raise ValueError("The trained model has no active adapter that asks for the optimizer of its config.")
        return built
