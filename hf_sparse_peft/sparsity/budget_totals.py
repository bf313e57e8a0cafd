"""Budgets that say how much over the whole model: of numbers, of entries, of components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..utils.option_types import PositiveFraction, PositiveInt
from ..utils.parts import register_part
from .allocation import counts_from_rank, counts_from_total, uniform_counts
from .budget import Budget, CountedUnits, Targets, Total
from .support import UnitGrid


@register_part("density")
@dataclass(frozen=True)
class Density(Total):
    """`floor(fraction * units)` of each weight at injection; while a rule trains as many numbers as this fraction of
    the entries of all weights, of whatever kind its units are."""

    fraction: PositiveFraction
    """Fraction of each weight's units in its support (0.005 is 0.5 %)."""

    follows_from_module: ClassVar[bool] = True

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module."""
        return uniform_counts(targets.grids, self.fraction)

    def density(self, targets: Targets) -> float:
        """The fraction."""
        return self.fraction

    def entries(self, targets: Targets) -> int:
        """Entries over all modules."""
        return UnitGrid(1, targets.entries).count_for_density(self.fraction)


@register_part("numbers")
@dataclass(frozen=True)
class Numbers(Total):
    r"""As many trained numbers over the model.

    At injection they are the entries of all supports, split in proportion to the weights' sizes: :math:`\lfloor N n_l /
    \sum n \rfloor` for a weight of :math:`n_l` (SpIEL; Ansell et al., 2024). While a rule trains they are the numbers
    of all of its units: a component of an `[m, n]` weight costs `m + n` and its gate, an entry 1.
    """

    numbers: PositiveInt
    """How many, at most."""
    count_factors: bool = False
    """Whether the numbers of the low-rank half are paid out of these at injection too."""

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module."""
        return counts_from_total(targets.grids, self.entries(targets))

    def density(self, targets: Targets) -> float:
        """Fraction of all entries."""
        return self.entries(targets) / targets.entries

    def entries(self, targets: Targets) -> int:
        """Entries over all modules."""
        factors = sum(targets.factor_numel.values()) if self.count_factors else 0
        left = self.numbers - factors
        if not 1 <= left <= targets.entries:
            paid = f" less the {factors} of the low-rank half" if factors else ""
            kind = "more than the" if left > 0 else "not one of the"
            raise ValueError(
                f"Numbers.numbers={self.numbers}{paid} is {kind} {targets.entries} entries of the targeted weights. "
                f"{'Lower it, or target more modules.' if left > 0 else 'Raise it, or lower r.'}"
            )
        return left

    def trained_numbers(self, targets: Targets) -> int:
        """All of them."""
        return self.numbers


@register_part("rank_equivalent")
@dataclass(frozen=True)
class RankEquivalent(Total):
    r"""As many entries in each weight as a LoRA of that rank has numbers, :math:`\min(r(m+n), mn)`; while a rule trains
    as many numbers as that LoRA has, over the model."""

    rank: PositiveInt
    """Rank of the LoRA."""

    follows_from_module: ClassVar[bool] = True

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module."""
        return counts_from_rank(targets.grids, self.rank)

    def density(self, targets: Targets) -> float:
        """Fraction of all entries."""
        return min(1.0, self.entries(targets) / targets.entries)

    def entries(self, targets: Targets) -> int:
        """Numbers of the LoRA over all modules."""
        return self.rank * sum(grid.rows + grid.cols for grid in targets.grids.values())


@register_part("fraction")
@dataclass(frozen=True)
class Fraction(Budget):
    """A fraction of the trained numbers that the model starts with; for training alone."""

    fraction: PositiveFraction = 0.5
    """Which."""

    def target(self, spaces: Sequence[CountedUnits], all_spaces: Sequence[CountedUnits]) -> int:
        """That fraction of what `spaces` start with, rounded."""
        return round(self.fraction * self.initial(spaces))


@register_part("average_rank")
@dataclass(frozen=True)
class AverageRank(Budget):
    """Components that a layer has on average, `r * layers` in all, whatever they cost (AdaLoRA's `target_r`); for
    training alone."""

    r: PositiveInt = 4
    """Average rank."""

    def check_training(self, config: Any, kinds: Sequence[str]) -> None:
        """Raises `ValueError` for units other than components, or where layers have room for fewer."""
        if set(kinds) != {"rank"}:
            raise ValueError(
                f"Allocate.budget={self} counts components, and Allocate.spaces={tuple(kinds)} has other units. Set "
                "budget=Numbers(n), Density(d) or Fraction(f), or spaces=('rank',)."
            )
        if self.r > config.r:
            raise ValueError(
                f"AverageRank.r={self.r} is above r={config.r}, the components that a layer has room for. Set r to at "
                f"least {self.r} (AdaLoRA: 1.5 x the average at the end; IncreLoRA: a few times it)."
            )

    def cost(self, space: CountedUnits) -> int:
        """1, whatever the component's size."""
        return 1

    def target(self, spaces: Sequence[CountedUnits], all_spaces: Sequence[CountedUnits]) -> int:
        """`r` for each space."""
        return self.r * len(spaces)
