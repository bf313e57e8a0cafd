"""Supports that lie where a pruned weight is not 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.parts import register_part
from .patterns import Pattern, Region
from .support import UnitGrid


@register_part("kept_weights")
@dataclass(frozen=True)
class KeptWeights(Pattern):
    """Single entries, all of them where the base weight is not 0: a support that moves on a pruned base and fills none
    of its zeros. On a 4-bit base weights that were kept and are 0 there are left out too."""

    reads_weight: ClassVar[bool] = True

    def on(self, weight: Callable[[], Tensor]) -> Pattern:
        """The pattern of that weight."""
        return _OnWeight(weight)

    def check_grid(self, grid: UnitGrid, name: str = "") -> None:
        """Entries only."""
        if grid.granularity != "entry":
            raise ValueError(
                f"pattern={self} is for entries, and '{name}' has granularity '{grid.granularity}'. Set "
                "granularity='entry', or pattern=None."
            )

    def capacity(self, grid: UnitGrid) -> int:
        """Entries of the weight: how many are not 0 is not known without it."""
        return grid.num_units


@dataclass(frozen=True)
class _OnWeight(Pattern):
    weight: Callable[[], Tensor]

    def __post_init__(self) -> None:
        """No option of a file."""

    @torch.no_grad()
    def region(self, scores: Tensor, grid: UnitGrid, kept: Tensor | None = None, seed: int = 0) -> Region:
        """The entries that are not 0, whatever the scores, and `kept`."""
        inside = self.weight().reshape(-1) != 0
        if kept is not None:
            inside[kept.long().to(inside.device)] = True
        return Region(inside.nonzero().squeeze(1).to(scores.device), grid)

    def capacity(self, grid: UnitGrid) -> int:
        """Entries that are not 0."""
        return int(self.weight().count_nonzero())

    @torch.no_grad()
    def check_units(self, units: Tensor, grid: UnitGrid, name: str = "") -> None:
        """None of them where the weight is 0."""
        weight = self.weight().reshape(-1)
        outside = int((weight[units.long().to(weight.device)] == 0).sum())
        if outside:
            raise ValueError(
                f"{outside} units of '{name}' lie where the base weight is 0, and pattern=kept_weights has none there."
            )
