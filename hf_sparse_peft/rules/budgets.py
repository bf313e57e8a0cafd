"""Budgets of units or trained numbers, and sharing one out between spaces that train and spaces held still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from ..utils.option_types import PositiveFraction, PositiveInt, Range
from ..utils.parts import Part, register_part
from .space import UnitSpace


@dataclass(frozen=True)
class Budget(Part):
    """Base of the budgets of a rule: what all spaces of a model may have together while it acts. What an adapter starts
    with is another matter, `hf_sparse_peft.Budget`."""

    part_kind: ClassVar[str] = "rule_budget"

    def cost(self, space: UnitSpace) -> int:
        """What one unit of `space` takes out of the budget: 1."""
        return 1

    def target(self, spaces: Sequence[UnitSpace], everybody: Sequence[UnitSpace]) -> int:
        """What `spaces`, some or all of the model's spaces `everybody`, may have together."""
        raise NotImplementedError

    def check(self, config: Any) -> None:
        """Refuse a config that starts with less. Raises `ValueError`."""

    def initial(self, spaces: Sequence[UnitSpace]) -> int:
        """What `spaces` have at injection."""
        return sum(space.initial * self.cost(space) for space in spaces)


@register_part("average_rank")
@dataclass(frozen=True)
class AverageRank(Budget):
    """Components that a layer has on average, `r * layers` in all, whatever they cost (AdaLoRA's `target_r`)."""

    r: PositiveInt = 4
    """Average rank."""

    def check(self, config: Any) -> None:
        """Raises `ValueError` where layers start with less."""
        if self.r > config.r:
            raise ValueError(
                f"AverageRank.r={self.r} is above r={config.r}, the rank every layer starts with. Set r to at least "
                f"{self.r} (AdaLoRA: 1.5 x the average at the end)."
            )

    def target(self, spaces: Sequence[UnitSpace], everybody: Sequence[UnitSpace]) -> int:
        """`r` for each space."""
        return self.r * len(spaces)


@register_part("sparsity")
@dataclass(frozen=True)
class Sparsity(Budget):
    """All but a fraction of the units that the weights have: entries of dense updates (SNELLA's `target_ratio`)."""

    sparsity: Annotated[float, Range(least=0, below=1)] = 0.3
    """Fraction of zeros."""

    def target(self, spaces: Sequence[UnitSpace], everybody: Sequence[UnitSpace]) -> int:
        """Units of each weight without its zeros."""
        return sum(space.size - round(self.sparsity * space.size) for space in spaces)


@register_part("trained_numbers")
@dataclass(frozen=True)
class TrainedNumbers(Budget):
    """Trained numbers of the whole model: a component of an `[m, n]` weight costs `m + n` and its gate, an entry 1."""

    numbers: PositiveInt = 1_000_000
    """How many."""

    def cost(self, space: UnitSpace) -> int:
        """Trained numbers of a unit."""
        return space.unit_numel

    def target(self, spaces: Sequence[UnitSpace], everybody: Sequence[UnitSpace]) -> int:
        """The part of some spaces is by what they started with."""
        return self.numbers * self.initial(spaces) // max(self.initial(everybody), 1)


@register_part("fraction")
@dataclass(frozen=True)
class Fraction(Budget):
    """A fraction of the trained numbers that the model starts with."""

    fraction: PositiveFraction = 0.5
    """Which."""

    def cost(self, space: UnitSpace) -> int:
        """Trained numbers of a unit."""
        return space.unit_numel

    def target(self, spaces: Sequence[UnitSpace], everybody: Sequence[UnitSpace]) -> int:
        """That fraction of what `spaces` start with, rounded."""
        return round(self.fraction * self.initial(spaces))


def budget_of_training(budget: int, spaces: Sequence[UnitSpace], alive: list[int], sizes: list[int]) -> int:
    """The part of `budget`, which is for all `spaces`, that those which train share out: all that is not in spaces
    held still, at least their part of it by size."""
    held = sum(count for space, count in zip(spaces, alive, strict=True) if not space.trains)
    train = sum(size for space, size in zip(spaces, sizes, strict=True) if space.trains)
    return max(budget * train // sum(sizes), budget - held)


def unit_sums(values: Tensor) -> Tensor:
    """`[k]` fp32 sums of |value| over the entries of each unit."""
    return values.detach().float().abs().unsqueeze(1).flatten(1).sum(1)
