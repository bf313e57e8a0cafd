"""Growth at random: any units, or first those that were never in the support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.parts import register_part
from ..utils.tensors import TensorSpec
from .growth import Growth, Move
from .space import UnitSpace


@register_part("random")
@dataclass(frozen=True)
class Random(Growth):
    """Any units that do not survive the drop, each set equally likely (SET; Mocanu et al., 2018)."""

    takes_shards: ClassVar[bool] = True

    def grow(self, move: Move) -> Tensor | None:
        """A draw of the move's own."""
        generator, region = move.generator("random growth"), move.random_region("random growth")
        return move.completed(region.random_units(move.count, generator, move.survivors), region)


@register_part("random_unfired")
@dataclass(frozen=True)
class RandomUnfired(Growth):
    """Random units that were never in the support; any others only where too few of them are left."""

    takes_shards: ClassVar[bool] = True

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """One bit a unit of the weight."""
        return [TensorSpec("fired", (-(-space.size // 8),), torch.uint8, role="rule")]

    def grow(self, move: Move) -> Tensor | None:
        """A draw of the move's own."""
        record, region = move.space.state()["fired"], move.random_region("unfired growth")
        mark_fired(record, move.units)
        fired = fired_units(record).to(move.units.dtype)
        count = min(move.count, region.size - int(region.contains(fired).sum()))
        grown = region.random_units(count, move.generator("unfired growth"), fired).to(move.units)
        if count < move.count:
            taken = torch.cat([move.survivors, grown]).sort().values
            rest = region.random_units(move.count - count, move.generator("random growth"), taken)
            grown = torch.cat([grown, rest.to(grown)])
        return move.completed(grown, region)


@torch.no_grad()
def mark_fired(fired: Tensor, units: Tensor) -> None:
    """Set the bit of every one of the distinct `units` in a record of units that were ever trained."""
    # One bit a unit of the weight: bits of distinct units in one byte add up without a carry.
    at, owner = torch.unique(units.long() >> 3, return_inverse=True)
    bits = torch.zeros(at.numel(), dtype=torch.int64, device=units.device)
    bits.index_add_(0, owner, torch.ones_like(bits[:1]).expand(owner.numel()) << (units.long() & 7))
    fired[at] = fired[at] | bits.to(torch.uint8)


def fired_units(fired: Tensor) -> Tensor:
    """Every unit that was ever trained, sorted int64."""
    at = fired.nonzero().squeeze(1)
    bits = torch.arange(8, device=fired.device)
    each = (at.unsqueeze(1) * 8 + bits).reshape(-1)
    return each[((fired[at].long().unsqueeze(1) >> bits) & 1).bool().reshape(-1)]
