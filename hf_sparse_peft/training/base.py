"""What all schedule callbacks share: finding their layers, attending to the config, keeping time, ending well."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import innermost
from ..tuners import AdapterLayer, adapter_layers, restore_fp32
from ..tuners.shared.best_model import warn_of_best_model
from ..tuners.shared.live_run import LiveRun, begin_run, end_with_train, run_on
from .trainer_checks import refuse_sharded, why_nothing_trains

_LAST_RUN: weakref.WeakKeyDictionary[AdapterLayer, dict[str, weakref.ref[LiveRun]]] = weakref.WeakKeyDictionary()
"""Layer -> adapter -> the run that last kept training state there."""


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer's share of one adapter."""

    layer: AdapterLayer
    adapter: str

    @property
    def name(self) -> str:
        """Module name of the layer."""
        return self.layer.module_name

    @property
    def config(self) -> PeftConfig:
        """The adapter's config, one object for all of its layers."""
        return self.layer.adapter_configs[self.adapter]

    @property
    def values(self) -> nn.Parameter:
        """Values of the support, living units first."""
        return self.layer.sparse_lora_values[self.adapter]

    @property
    def units(self) -> torch.Tensor:
        """Living units, sorted."""
        return self.layer.units(self.adapter)

    @property
    def tensors(self) -> list[nn.Parameter]:
        """Its parameters: of the support, the factors and the gate, as far as the layer has them."""
        held = [getattr(self.layer, name) for name in self.layer.adapter_layer_names]
        return [tensors[self.adapter] for tensors in held if self.adapter in tensors]

    @property
    def trains(self) -> bool:
        """Whether it takes part in the current step; what rests is neither moved, nor thinned, nor ranked."""
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def trained(self) -> torch.Tensor:
        """Bool `[a]`: which living units train, that is, are not frozen."""
        alive = self.units.numel()
        frozen = self.layer.rule_state(self.adapter).get("frozen")
        if frozen is not None:
            return frozen[:alive] == 0
        return torch.ones(alive, dtype=torch.bool, device=self.values.device)

    @property
    def trained_units(self) -> torch.Tensor:
        """Units that train, sorted."""
        return self.units[self.trained]


class ScheduleCallback(TrainerCallback):
    """Base of the callbacks that carry out one schedule of a config, on every trained adapter that asks.

    A callback keeps no state of its own between steps: what a resumed run must find again lives in buffers of the
    layers, which Trainer saves and loads with the adapter, and everything else follows from the step number.
    """

    option: str = ""
    """Field of the config that this callback carries out."""

    def __init__(self) -> None:
        self.parts: list[AdaptedLayer] = []
        self.total_steps = 0
        self.run: LiveRun | None = None
        self.missed = False
        """Whether a layer rested when it was due."""

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a sharded run before any process wraps the model, undo the casts of the trainer's constructor, end a
        run on this model that was broken off, and let this trainer's own runs end however they end.

        Raises:
            ValueError: DeepSpeed or FSDP is switched on, by whatever means.
        """
        refuse_sharded(args, self.option)
        end_with_train()
        if model is not None:
            run_on(model)
            restore_fp32(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Find the layers, prepare their state and check the schedule against the run's length.

        Raises:
            ValueError: no trained adapter asks for this schedule, the schedule does not fit into the run, or the run is
                sharded in a way that hides gradients and optimizer state from callbacks.
        """
        refuse_sharded(args, self.option, model)
        warn_of_best_model(args, state, model)
        self.total_steps = state.max_steps
        self.join(model, kwargs.get("optimizer"))
        self.parts = [
            AdaptedLayer(layer, name)
            for layer in adapter_layers(model)
            for name in layer.active_adapters
            if name in layer.adapter_configs
            and getattr(layer.adapter_configs[name], self.option, None) is not None
            and self.wants(layer, name)
        ]
        if not self.parts:
            raise ValueError(why_nothing_trains(type(self).__name__, self.option, model))
        for config in self.configs():
            self.run.attend(config, self.option)
            config.training_finished = False
            self.check_length(config)
        for part in self.parts:
            _allocate_state(part, self.run, fresh=not state.global_step)
        if not state.global_step:  # a resumed run said it at its start
            for config in self.configs():
                self.check_effect(config)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Free the schedule's state once the last step is done, so that the shipped adapter is small."""
        self.leave()
        if state.global_step < state.max_steps:
            return  # stopped early: a resumed run needs it
        for part in self.parts:
            part.layer.drop_training_state(part.adapter)
        for config in self.configs():
            config.training_finished = True

    def join(self, model: nn.Module, optimizer: Any = None) -> None:
        """Take part in the run on `model`.

        Raises:
            ValueError: `optimizer` was built while parameters rested in a run that was broken off.
        """
        self.missed = False
        self.run = begin_run(model, adapter_layers(model))
        self.run.join(self, self.release)
        groups = innermost(optimizer).param_groups if optimizer is not None else []
        known = {id(parameter) for group in groups for parameter in group["params"]}
        if known and any(id(parameter) not in known for parameter in self.run.woken):
            raise ValueError(
                "A run that was broken off had let parameters rest, and this optimizer was built before they were "
                "woken, without them. They train again now: make a new Trainer (or optimizer) and call train()."
            )

    def leave(self) -> None:
        """Take this callback's marks off the model."""
        if self.run is not None:
            self.run.leave(self)

    def release(self) -> None:
        """Take off the model what must not outlive the run; also called when the run is broken off."""

    def configs(self) -> list[PeftConfig]:
        """The configs concerned, each once."""
        return list({id(part.config): part.config for part in self.parts}.values())

    def wants(self, layer: AdapterLayer, adapter: str) -> bool:
        """Whether the layer has a trained part that this schedule moves."""
        held = layer.sparse_lora_values
        return adapter in held and held[adapter].requires_grad

    def check_length(self, config: PeftConfig) -> None:
        """Refuse a schedule that cannot run in `self.total_steps` steps."""

    def check_effect(self, config: PeftConfig) -> None:
        """Say, at the start of a run, which layers the schedule would never change."""

    def parts_of(self, config: PeftConfig) -> list[AdaptedLayer]:
        """The layers of one adapter."""
        return [part for part in self.parts if part.config is config]


def _allocate_state(part: AdaptedLayer, run: LiveRun, fresh: bool) -> None:
    """Training state for `run`; where it starts afresh, not what an earlier run that did not end left behind."""
    runs = _LAST_RUN.setdefault(part.layer, {})
    if fresh and part.adapter in runs and runs[part.adapter]() is not run:
        part.layer.drop_training_state(part.adapter)
    runs[part.adapter] = weakref.ref(run)
    part.layer.allocate_training_state(part.adapter)
