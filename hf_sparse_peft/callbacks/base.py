"""What all schedule callbacks share: finding their layers, attending to the config, keeping time, ending well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuners import AdapterLayer, adapter_layers, restore_fp32
from .trainer_checks import refuse_sharded, warn_of_best_model, why_nothing_trains


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
    def trained(self) -> torch.Tensor:
        """Bool `[a]`: which living units train, that is, are not frozen."""
        alive = self.units.numel()
        if self.adapter in self.layer.sparse_lora_frozen:
            return self.layer.sparse_lora_frozen[self.adapter][:alive] == 0
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

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Refuse a sharded run before any process wraps the model, and undo the casts of the trainer's constructor.

        Raises:
            ValueError: DeepSpeed or FSDP is switched on, by whatever means.
        """
        refuse_sharded(args, self.option)
        if model is not None:
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
            config._schedule_attended = True
            config.training_finished = False
            self.check_length(config)
        for part in self.parts:
            part.layer.allocate_training_state(part.adapter)
        if not state.global_step:  # a resumed run said it at its start
            for config in self.configs():
                self.check_effect(config)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Free the schedule's state once the last step is done, so that the shipped adapter is small."""
        if state.global_step < state.max_steps:
            return  # stopped early: a resumed run needs it
        for part in self.parts:
            part.layer.drop_training_state(part.adapter)
        for config in self.configs():
            config.training_finished = True

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


def whole_steps(share: float, total_steps: int) -> int:
    """`floor(share * total_steps)`; 0.29 of 100 steps are 29, though the product of the floats is 28.999...."""
    return int(share * total_steps + 1e-9)


def is_distributed() -> bool:
    """Whether several processes train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def from_first_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The first rank's `tensor` on all ranks, of one shape everywhere; itself where nothing is distributed."""
    if is_distributed():
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor, 0)
    return tensor


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` averaged over all ranks, in place; itself where nothing is distributed."""
    if is_distributed():
        torch.distributed.all_reduce(tensor)
        tensor /= torch.distributed.get_world_size()
    return tensor


def unit_sums(values: torch.Tensor) -> torch.Tensor:
    """`[k]` fp32 sums of |value| over the entries of each unit."""
    return values.detach().float().abs().unsqueeze(1).flatten(1).sum(1)
