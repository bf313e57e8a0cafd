"""Units that begin to train in the middle of a run: fresh optimizer state, a learning-rate schedule of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..utils.parts import Part, register_part
from ..utils.tensors import TensorSpec
from .moves import restart_units
from .space import UnitSpace


class Schedule(NamedTuple):
    """Where the learning rate of an optimizer's group stands."""

    step: int
    """Updates done."""
    total_steps: int
    warmup_steps: int
    base_lr: float
    """What the rate rises to in the warm-up."""
    lr: float
    """The rate of the coming update."""


@dataclass(frozen=True)
class EnteringRate(Part):
    """Base of the learning rates of units that begin to train after the run has begun (`Run.train_units`)."""

    part_kind: ClassVar[str] = "entering_rate"

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """int32 `[parameters, size]`: the number, from 1, of a unit's first update in each parameter; 0: none yet."""
        shape = (len(space.parameters()), space.size)
        return [TensorSpec("first_updates", shape, torch.int32, role="rule", space=space.kind, axis=1)]

    def rates(self, run: Schedule, first: Tensor) -> Tensor | float:
        """Learning rates at the coming update of units with the first updates `first` (from 1), fp32 of its shape."""
        raise NotImplementedError


@register_part("run")
@dataclass(frozen=True)
class RunRate(EnteringRate):
    """The run's own."""

    def rates(self, run: Schedule, first: Tensor) -> Tensor | float:
        """That of the coming update."""
        return run.lr


@register_part("constant")
@dataclass(frozen=True)
class ConstantRate(EnteringRate):
    """The run's base learning rate to the end, as IncreLoRA's released code has it without `multi_lr`."""

    def rates(self, run: Schedule, first: Tensor) -> Tensor | float:
        """`base_lr`."""
        return run.base_lr


@register_part("own_clock")
@dataclass(frozen=True)
class OwnClock(EnteringRate):
    r"""A linear schedule of their own over what is left of the run, with the run's `W` warm-up steps (IncreLoRA's
    `multi_lr`; Zhang et al., 2023): with `n` updates left at a unit's first, and `s` done since,
    :math:`\eta_0 s / W` while :math:`s < W`, then :math:`\eta_0 (n - s) / (n - W)`."""

    def rates(self, run: Schedule, first: Tensor) -> Tensor | float:
        """fp32, of `first`'s shape."""
        done, left = run.step + 1 - first, run.total_steps + 1 - first
        falls = ((left - done) / (left - run.warmup_steps).clamp_min(1)).clamp_min(0)
        return run.base_lr * torch.where(done < run.warmup_steps, done / max(1, run.warmup_steps), falls)


@torch.no_grad()
def start_units(
    space: UnitSpace, parameter: nn.Parameter, axis: int, trained: Tensor, step: int, optimizer: Any
) -> None:
    """Let the optimizer start afresh with those of the `trained` units (bool `[size]`) whose first update comes, after
    `step` others."""
    first = _first_updates(space, parameter)
    fresh = trained & (first == 0)
    if fresh.any():
        first[fresh] = step + 1
        if step:
            restart_units(parameter, fresh, optimizer, axis)


def rate_factors(space: UnitSpace, parameter: nn.Parameter, rate: EnteringRate, run: Schedule) -> Tensor | None:
    """Learning rate of each unit over the run's, fp32 `[size]`; 1 for what began with the run. None: 1 for all."""
    first = _first_updates(space, parameter)
    if not run.lr or not (first > 1).any():
        return None
    factors = torch.ones_like(first, dtype=torch.float32)
    return torch.where(first > 1, factors * (rate.rates(run, first) / run.lr), factors)


def _first_updates(space: UnitSpace, parameter: nn.Parameter) -> Tensor:
    row = next(at for at, found in enumerate(space.parameters()) if found is parameter)
    return space.state()["first_updates"][row]
