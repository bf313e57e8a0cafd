"""Units that begin to train in the middle of a run: fresh optimizer state, a learning-rate schedule of their own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..utils.tensors import TensorSpec
from .moves import restart_units
from .run import Run
from .space import UnitSpace

EnteringRate = Literal["own_clock", "constant", "run"]
"""Learning rate of what begins to train late: a linear schedule of its own over what is left of the run, with the
run's warm-up; the run's base learning rate throughout; or the run's learning rate of the step."""


def clock_spec(space: UnitSpace) -> TensorSpec:
    """What a rule keeps of it: int32 `[parameters, size]`, the number (from 1) of a unit's first update in each
    parameter; 0: it has not begun."""
    shape = (len(space.parameters()), space.size)
    return TensorSpec("first_updates", shape, torch.int32, role="rule", space=space.kind, axis=1)


@torch.no_grad()
def start_units(run: Run, space: UnitSpace, parameter: nn.Parameter, units: Tensor) -> None:
    """Units (bool `[size]`) of `parameter` train from the coming update on. Those that begin with it, not with an
    earlier one, start with fresh optimizer state."""
    begun = _first_updates(space, parameter)
    fresh = units & (begun == 0)
    if fresh.any():
        begun[fresh] = run.step + 1
        if run.step:
            axis = next(axis for one, axis in space.parameter_axes() if one is parameter)
            restart_units(parameter, fresh, run.optimizer, axis)


def rate_factor(run: Run, space: UnitSpace, parameter: nn.Parameter, kind: EnteringRate) -> Tensor | None:
    r"""Learning rate of each unit over the run's, `[size]`, for `Run.scale_updates`; 1 for what began with the run.

    With the unit's first update at step :math:`t_0` (from 0), `n` = :math:`T - t_0` steps left then, `s` =
    :math:`t - t_0` and the run's `W` warm-up steps, `own_clock` is :math:`\eta_0 s / W` while `s < W`, then
    :math:`\eta_0 (n - s) / (n - W)`, as IncreLoRA's released scheduler has it.
    """
    first = _first_updates(space, parameter)
    group = run.group(parameter)
    if kind == "run" or not float(group["lr"]):
        return None
    base, now = float(group.get("initial_lr", group["lr"])), float(group["lr"])
    own = torch.ones_like(first, dtype=torch.float32)
    if kind == "own_clock":
        since, left, warmup = run.step - (first - 1), run.total_steps - (first - 1), run.training.warmup_steps
        rises, falls = since / max(1, warmup), (left - since) / (left - warmup).clamp_min(1)
        own = torch.where(since < warmup, rises, falls.clamp_min(0))
    return torch.where(first > 1, own * (base / now), torch.ones_like(own))


def _first_updates(space: UnitSpace, parameter: nn.Parameter) -> Tensor:
    row = next(at for at, one in enumerate(space.parameters()) if one is parameter)
    return space.state()["first_updates"][row]
