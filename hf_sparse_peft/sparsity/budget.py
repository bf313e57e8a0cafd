"""Budgets: how many units, at injection and while a rule trains. A budget is a part, and anybody may register one:

    @register_part("square_root")
    @dataclass(frozen=True)
    class SquareRoot(Budget):
        def counts(self, targets):
            return {name: math.isqrt(grid.num_units) for name, grid in targets.grids.items()}

    SparseLoraConfig(r=0, budget=SquareRoot())

A budget answers one of two questions, or both, and refuses the other by name:

    SparseLoraConfig.budget     counts(targets)                  units of each module's support at injection
    Allocate.budget             target(spaces, all_spaces)       what all spaces may have together in the end
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from ..utils.parts import Part, part_types
from .scores import Chunks
from .support import UnitGrid


class CountedUnits(Protocol):
    """What a budget asks of a space of units that trains (`rules.UnitSpace`)."""

    name: str
    """Name of the module."""
    initial: int
    """Units that live when the adapter is injected."""
    count: int
    """Units that live."""
    unit_numel: int
    """Trained numbers of a unit."""
    unit_entries: int
    """Entries of the weight that belong to a unit alone."""
    weight_shape: tuple[int, int]
    """`(out, in)` of the module's weight."""


class Competition(NamedTuple):
    """Modules whose units are ranked together."""

    modules: tuple[str, ...]
    units: int
    """Units of all of them together."""
    least: int
    """Units, the best of its own, that each of them keeps."""


def _no_entries() -> int:
    raise ValueError("A budget of a share of the whole model needs the model, and these targets are given without.")


def _no_pattern(patterns: Mapping[str, Any], name: str) -> str | None:
    return name if name in patterns else None


@dataclass(frozen=True)
class Targets:
    """The weights that a budget is for."""

    grids: dict[str, UnitGrid]
    """Module name -> how its weight is cut into units."""
    seed: int = 0
    """For draws among modules that tie, and for those of modules."""
    scores: Callable[[str], Chunks] | None = None
    """Module name -> score chunks by the config's criterion; None where that waits for data."""
    factor_numel: dict[str, int] = field(default_factory=dict)
    """Module name -> numbers of its low-rank factors, where it has any."""
    find: Callable[[Mapping[str, Any], str], str | None] = _no_pattern
    """`(patterns, module name)` -> the pattern that holds for the module, None without one."""

    model_entries: Callable[[], int] = _no_entries
    """Entries of all two-dimensional weights of the model, embeddings and head included, dense or quantised."""

    @property
    def entries(self) -> int:
        """Entries of all weights."""
        return sum(grid.rows * grid.cols for grid in self.grids.values())

    @property
    def units(self) -> int:
        """Units of all weights."""
        return sum(grid.num_units for grid in self.grids.values())


@dataclass(frozen=True)
class Budget(Part):
    """Base of the budgets."""

    part_kind: ClassVar[str] = "budget"
    follows_from_module: ClassVar[bool] = False
    """Whether a module's count follows from its weight's shape alone. Other counts are written to the config's `sizes`
    at injection, so that a file says them."""
    ranks_units: ClassVar[bool] = False
    """Whether counts follow from one ranking of all units by the criterion."""

    may_leave_none: ClassVar[bool] = False
    """Whether that ranking may leave a module without a unit."""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Patterns of module names that must match something."""
        return ()

    # At injection

    def check_injection(self, config: Any) -> None:
        """Refuse a config whose supports cannot have this budget at injection.

        Raises:
            ValueError: they do not go together, or the budget is one for training alone.
        """
        if type(self).counts is Budget.counts:
            raise ValueError(
                f"budget={self} says what units are left at the end of training, not how many a support starts with. "
                f"Set budget to one of {_answering('counts')}, or density, and Allocate.budget={self}."
            )

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module's support; modules without one may be absent.

        Raises:
            ValueError: the budget is more than the weights have, or leaves a module without a unit; names it.
        """
        raise NotImplementedError

    def competitions(self, targets: Targets, head_numel: int = 0) -> list[Competition]:
        """With `ranks_units`: which modules' units data ranks together, and how many are chosen; `head_numel` numbers
        of `modules_to_save` train beside them."""
        raise NotImplementedError

    def ranks(self, targets: Targets) -> dict[str, int]:
        """Ranks of modules whose low-rank half is not the config's; none by default."""
        return {}

    # While a rule trains

    def check_training(self, config: Any, kinds: Sequence[str]) -> None:
        """Refuse a config whose units of these `kinds` cannot be brought to this budget while they train.

        Raises:
            ValueError: they start with less, or the budget is one for injection alone.
        """
        if type(self).target is Budget.target:
            raise ValueError(
                f"Allocate.budget={self} says how many units each support starts with, not what all of them may have "
                f"together while they train. Set Allocate.budget to one of {_answering('target')}."
            )

    def cost(self, space: CountedUnits) -> int:
        """What a unit of `space` takes out of the budget: its trained numbers, or where units have none of their own
        its entries of the weight."""
        return space.unit_numel or space.unit_entries

    def initial(self, spaces: Sequence[CountedUnits]) -> int:
        """What the units of `spaces` took at injection."""
        return sum(space.initial * self.cost(space) for space in spaces)

    def target(self, spaces: Sequence[CountedUnits], all_spaces: Sequence[CountedUnits]) -> int:
        """What the units of `spaces`, some or all of the model's `all_spaces`, may take together in the end."""
        raise NotImplementedError

    def left(self, spaces: Sequence[CountedUnits]) -> int:
        """What the living units of all `spaces` leave of it; 0 where no unit is to be had for that."""
        left = self.target(spaces, spaces) - sum(space.count * self.cost(space) for space in spaces)
        return left if left >= min(map(self.cost, spaces)) else 0


@dataclass(frozen=True)
class Total(Budget):
    """Base of the budgets that say how much over the whole model, which others split in another way than by the
    weights' sizes, and `Allocate` by score."""

    def density(self, targets: Targets) -> float:
        """Fraction of all entries."""
        raise NotImplementedError

    def entries(self, targets: Targets) -> int:
        """Entries over all modules."""
        raise NotImplementedError

    def trained_numbers(self, targets: Targets) -> int:
        """Trained numbers over all modules, entries or not."""
        return self.entries(targets)

    def target(self, spaces: Sequence[CountedUnits], all_spaces: Sequence[CountedUnits]) -> int:
        """`trained_numbers` for the weights of all spaces; some of these get what they started with a fraction of."""
        total = self.trained_numbers(Targets({space.name: UnitGrid(*space.weight_shape) for space in all_spaces}))
        return total * self.initial(spaces) // max(self.initial(all_spaces), 1)


def _answering(question: str) -> list[str]:
    own = getattr(Budget, question)
    return sorted(cls.__name__ for cls in part_types(Budget).values() if getattr(cls, question) is not own)
