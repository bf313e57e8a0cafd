"""Frozen units: excluded from the update, still part of the weight. Rules that freeze share the state `frozen`."""

from __future__ import annotations

import warnings
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..sparsity import stream_seed, top_units
from ..utils.tensors import TensorSpec
from .moves import move_units
from .run import Run
from .space import UnitSpace, unit_sums


def frozen_state(space: UnitSpace) -> TensorSpec:
    """`frozen`, 1 where a living unit is frozen; `[capacity]`, follows the units."""
    return TensorSpec("frozen", (space.capacity,), torch.uint8, role="rule", space=space.kind)


def hold_frozen(run: Run) -> None:
    """Keep frozen values as they are while the optimizer steps on the whole parameter. Their gradients are zeroed
    before clipping; their optimizer state starts at zero and is of no use until they are trained again."""
    parts = [(space.values, partial(_mask, space)) for space in run.spaces(training=False)]
    run.updates.hold_part(run, parts, keep_state=False)


def _mask(space: UnitSpace) -> Tensor | None:
    return space.frozen


class Moved(NamedTuple):
    """What became of the units of a space."""

    entered: int
    """Units that are trained now and were not before."""
    retired: int
    """Units that are frozen with a learned change, after the move."""
    lost: int
    """Units whose learned change was given up for want of room."""


@torch.no_grad()
def move_trained_units(run: Run, space: UnitSpace, trained: Tensor, seeds: dict[str, Tensor] | None = None) -> Moved:
    """Make `trained` (sorted, as many as now) the units that train; those that leave with a learned change retire.

    Retired units are frozen: they keep their value and lose their optimizer state; one that is trained again keeps its
    value and starts with zero state. Where the space has too little room, those with the smallest sum of |value| give
    theirs up. Without room (no state `frozen`) units that leave lose their change, as SpIEL, SET and RigL publish it.
    """
    before = space.trained_units()
    entered = int((~torch.isin(trained, before)).sum())
    if space.frozen is None:
        move_units(space, trained, run.optimizer, seeds=seeds)
        return Moved(entered, 0, 0)
    living, values = space.alive(), unit_sums(space.living_values())
    keeps = ~torch.isin(living, trained) & (values > 0)
    retired, change = living[keeps], values[keeps]
    room = space.capacity - trained.numel()
    lost = max(0, retired.numel() - room)
    if lost:
        retired = retired[top_units(change, room, seed=stream_seed(space.seed, "retired", space.name)).long()]
        _warn_full(run)
    support = torch.cat([trained, retired]).sort().values
    restarted = torch.cat([retired, trained[~torch.isin(trained, before)]])
    move_units(space, support, run.optimizer, seeds=seeds, restarted=restarted)
    frozen = space.frozen.zero_()
    frozen[torch.searchsorted(support, retired)] = 1
    return Moved(entered, retired.numel(), lost)


def _warn_full(run: Run) -> None:
    if getattr(run.memory, "full_told", False):
        return
    run.memory.full_told = True
    warnings.warn(
        f"The room for retired units is full (Regrow.retired={run.rule.retired}): those with the smallest learned "
        "change lose it from now on, counted as `lost` in the runner's events. Raise retired, or move less.",
        stacklevel=3,
    )
