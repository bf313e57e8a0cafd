"""Budgets that say how many units each module gets, or in which way a total is split over the modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from ..utils.option_types import PositiveFloat, PositiveInt, Range
from ..utils.parts import register_part
from .allocation import erdos_renyi_counts, global_counts, proportional_counts
from .budget import Budget, Competition, CountedUnits, Targets, Total
from .budget_totals import Density
from .scores import Random, SmallestMagnitude
from .selection import stream_seed
from .support import UnitGrid


@register_part("units_per_module")
@dataclass(frozen=True)
class UnitsPerModule(Budget):
    """The same number of units in every module."""

    units: PositiveInt
    """Units of each support."""

    follows_from_module: ClassVar[bool] = True

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module."""
        for name, grid in targets.grids.items():
            if self.units > grid.num_units:
                raise ValueError(
                    f"UnitsPerModule.units={self.units} is more than the {grid.num_units} {grid.granularity} units of "
                    f"'{name}' ({grid.rows}x{grid.cols}). Lower it, or leave the module out."
                )
        return dict.fromkeys(targets.grids, self.units)


@register_part("by_module")
@dataclass(frozen=True)
class ByModule(Budget):
    """A density for each module, by its name."""

    densities: dict[str, Annotated[float, Range(least=0, most=1)]]
    """Module name or regex -> fraction of its units; 0 leaves the support out there."""
    otherwise: Annotated[float, Range(least=0, most=1)] = 0.005
    """Density of modules that no pattern matches; 0: they get no support."""

    follows_from_module: ClassVar[bool] = True

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names."""
        return tuple(self.densities)

    def density_of(self, name: str, find: Callable[[Mapping[str, Any], str], str | None]) -> float:
        """Density of the module of that name."""
        return self.densities.get(find(self.densities, name), self.otherwise)

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module; those of density 0 are left out."""
        fractions = {name: self.density_of(name, targets.find) for name in targets.grids}
        return {
            name: targets.grids[name].count_for_density(fraction, name)
            for name, fraction in fractions.items()
            if fraction
        }


@dataclass(frozen=True)
class Split(Budget):
    """Base of the budgets that split a total in a way of their own; a number is a density."""

    total: Total | float
    """How much: `Density`, `Numbers`, `RankEquivalent`, or a number, a density."""

    def __post_init__(self) -> None:
        if isinstance(self.total, (int, float)) and not isinstance(self.total, bool):
            object.__setattr__(self, "total", Density(self.total))
        super().__post_init__()

    def cost(self, space: CountedUnits) -> int:
        """The total's."""
        return self.total.cost(space)

    def target(self, spaces: Sequence[CountedUnits], all_spaces: Sequence[CountedUnits]) -> int:
        """The total's: a rule splits it anew."""
        return self.total.target(spaces, all_spaces)


@register_part("proportional")
@dataclass(frozen=True)
class Proportional(Split):
    """In proportion to the weights' sizes, and so that the whole total is spent: a module may get none."""

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module."""
        return proportional_counts(targets.grids, self.total.entries(targets), targets.seed)


@register_part("erdos_renyi")
@dataclass(frozen=True)
class ErdosRenyi(Split):
    r"""A density of :math:`\varepsilon (m+n)/(mn)` for each weight (Mocanu et al., 2018; Evci et al., 2020)."""

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module."""
        return erdos_renyi_counts(targets.grids, self.total.density(targets), targets.seed)


@register_part("global")
@dataclass(frozen=True)
class Global(Split):
    """The best units of the whole model, ranked by the config's criterion, at least one in each module."""

    pay_head: bool = False
    """Whether the numbers of `modules_to_save` are paid out of the total (FISH); needs a criterion by data."""

    ranks_units: ClassVar[bool] = True

    def check_injection(self, config: Any) -> None:
        """A criterion that ranks; for `pay_head` one by data, over entries."""
        if isinstance(config.criterion, Random):
            raise ValueError(
                "budget=Global(...) ranks units by the criterion, and criterion='random' ranks nothing. Choose "
                "criterion='magnitude', or a density or ErdosRenyi."
            )
        entries = config.granularity == "entry" and not config.granularity_pattern
        if self.pay_head and not (config.needs_calibration and entries):
            raise ValueError(
                "Global.pay_head=True takes the head's numbers out of one budget for the whole model. It needs "
                "granularity='entry' and a criterion that is estimated from data, e.g. 'fisher'."
            )

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module; without scores, room until data decides."""
        density = self.total.density(targets)
        if int(density * targets.units) < len(targets.grids):
            raise ValueError(
                f"density={density:.2e} leaves {int(density * targets.units)} of the {targets.units} units, and each "
                f"of the {len(targets.grids)} targeted modules keeps at least one. Raise density to at least "
                f"{len(targets.grids) / targets.units:.1e}, or target fewer modules."
            )
        if targets.scores is None:
            return {name: max(1, int(density * grid.num_units)) for name, grid in targets.grids.items()}
        # Rounded as torch.nn.utils.prune does, so that what one-shot pruning removes is what this chooses.
        chunks = {name: targets.scores(name) for name in targets.grids}
        return global_counts(chunks, targets.grids, round(density * targets.units), targets.seed)

    def competitions(self, targets: Targets, head_numel: int = 0) -> list[Competition]:
        """All modules at once, of which each keeps its best unit."""
        total = max(len(targets.grids), self.units_by_data(targets, head_numel))
        return [Competition(tuple(targets.grids), total, 1)]

    def units_by_data(self, targets: Targets, head_numel: int = 0) -> int:
        """Units over all modules where data ranks them, the head's numbers paid.

        Raises:
            ValueError: the head leaves less than one entry a module.
        """
        # Within float error: Numbers of a large model must not lose one on its way through a density.
        total = UnitGrid(1, targets.units).count_for_density(self.total.density(targets))
        if not self.pay_head:
            return total
        modules = len(targets.grids)
        if total - head_numel < modules:
            raise ValueError(
                f"Global.pay_head: the budget of {total} entries has to pay for {head_numel} numbers of "
                f"modules_to_save and one entry for each of {modules} modules. Raise the density to at least "
                f"{(head_numel + modules) / targets.entries:.1e}, or set pay_head=False."
            )
        return total - head_numel


@register_part("below_threshold")
@dataclass(frozen=True)
class BelowThreshold(Budget):
    r"""All entries with :math:`|w| < \tau` (SaRA; Hu et al., 2025)."""

    threshold: PositiveFloat
    r"""The threshold :math:`\tau`."""

    def check_injection(self, config: Any) -> None:
        """Entries, the smallest first."""
        if not isinstance(config.criterion, SmallestMagnitude) or config.granularity != "entry":
            raise ValueError(
                "budget=BelowThreshold(...) takes every entry with |w| below it, so it needs granularity='entry' and "
                f"criterion='smallest_magnitude'; got granularity={config.granularity!r} and criterion="
                f"'{config.criterion.part_type}'."
            )

    def counts(self, targets: Targets) -> dict[str, int]:
        """Entries of each module below the threshold."""
        counts = {}
        for name, grid in targets.grids.items():
            counts[name] = sum(int((chunk > -self.threshold).sum()) for chunk in targets.scores(name)())
            if counts[name] == 0:
                raise ValueError(
                    f"BelowThreshold.threshold={self.threshold} leaves no entry in '{name}' ({grid.rows}x{grid.cols}): "
                    "none is smaller. Raise it, use density instead, or leave the module out of target_modules."
                )
        return counts


@register_part("whole_tensors")
@dataclass(frozen=True)
class WholeTensors(Split):
    """Whole matrices, and pairs of low-rank factors where the config has them, drawn at random (APET; Su et al., 2023).

    With a low-rank half, one half of the total goes to pairs of factors and one to matrices, each in a random order:
    what fits into what is left of its half is taken, what does not is skipped. Modules whose pair was not drawn get
    rank 0.
    """

    def check_injection(self, config: Any) -> None:
        """Rows or columns: an index of a few units a matrix."""
        if config.granularity not in ("row", "column") or config.granularity_pattern:
            raise ValueError(
                f"budget=WholeTensors(...) trains whole matrices, and granularity={config.granularity!r} with "
                f"granularity_pattern={config.granularity_pattern} would keep an index for each of their parts. Set "
                "granularity='row' and granularity_pattern={}."
            )

    def counts(self, targets: Targets) -> dict[str, int]:
        """All units of the matrices that were drawn, none of the others."""
        drawn = self._drawn(targets)[1]
        return {name: grid.num_units if name in drawn else 0 for name, grid in targets.grids.items()}

    def ranks(self, targets: Targets) -> dict[str, int]:
        """0 for modules whose pair of factors was not drawn."""
        drawn = self._drawn(targets)[0]
        return {name: 0 for name in targets.grids if name not in drawn} if targets.factor_numel else {}

    def _drawn(self, targets: Targets) -> tuple[list[str], list[str]]:
        """Modules whose pair of factors and whose matrix was drawn."""
        numel = {name: grid.rows * grid.cols for name, grid in targets.grids.items()}
        pairs = {name: targets.factor_numel[name] for name in targets.grids if targets.factor_numel.get(name)}
        budget = self.total.entries(targets)
        budget = budget // 2 if pairs else budget
        seeds = [stream_seed(targets.seed, "tensors", kind) for kind in ("pairs", "weights")]
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        found = draw_tensors(pairs, budget, draws[0]), draw_tensors(numel, budget, draws[1])
        if not any(found):
            raise ValueError(
                f"budget=WholeTensors(...) has {budget} numbers for whole matrices, and the smallest has "
                f"{min(numel.values())}. Raise the total, or set r >= 1, whose pairs of factors are smaller."
            )
        return found


def draw_tensors(sizes: dict[str, int], budget: int, generator: torch.Generator) -> list[str]:
    """Names of `sizes` in a random order, each taken if its numbers fit into what is left of `budget`, else skipped."""
    names, taken = list(sizes), []
    for number in torch.randperm(len(names), generator=generator).tolist():
        name = names[number]
        if sizes[name] <= budget:
            taken.append(name)
            budget -= sizes[name]
    return taken
