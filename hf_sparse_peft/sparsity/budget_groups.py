"""A budget of its own for each group of modules, within which all units compete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..utils.option_types import PositiveFraction, PositiveInt
from ..utils.parts import register_part, require
from .budget import Budget, Competition, Targets
from .scores import Random
from .selection import Source, count_selected, find_cut, rereadable, stream_seed
from .support import UnitGrid


@register_part("global_by_group")
@dataclass(frozen=True)
class GlobalByGroup(Budget):
    """The best units of each group of modules, ranked by the config's criterion over all layers of the group (SMT; He
    et al., 2025). A module may get none, and modules that no group names get none."""

    groups: dict[str, PositiveInt | PositiveFraction]
    """Module name or regex -> the units of all modules that it matches together: a whole number of them, or a fraction
    (a float), e.g. `{"[qkv]_proj": 890, "(gate|up|down)_proj": 0.01}`."""
    of: Literal["group", "model"] = "group"
    """What a fraction is of: the entries of the group's weights, or of all two-dimensional weights of the model,
    embeddings and head included (SMT)."""

    ranks_units: ClassVar[bool] = True
    may_leave_none: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.groups), self, "groups", "at least one pattern with its units")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The groups' patterns."""
        return tuple(self.groups)

    def check_injection(self, config: Any) -> None:
        """A criterion that ranks."""
        if isinstance(config.criterion, Random):
            raise ValueError(
                "budget=GlobalByGroup(...) ranks units by the criterion, and criterion='random' ranks nothing. Choose "
                "criterion='magnitude', or one by data, e.g. 'fisher'."
            )

    def counts(self, targets: Targets) -> dict[str, int]:
        """Units of each module; without scores, room until data decides."""
        counts = dict.fromkeys(targets.grids, 0)
        for group in self.competitions(targets):
            if targets.scores is None:
                available = sum(targets.grids[name].num_units for name in group.modules)
                shares = {name: group.units * targets.grids[name].num_units // available for name in group.modules}
                counts |= {name: max(1, share) for name, share in shares.items()}
                continue
            sources = [
                Source(name, rereadable(targets.scores(name)), stream_seed(targets.seed, name))
                for name in group.modules
            ]
            cut = find_cut(sources, group.units, finite=True)
            counts |= {source.name: count_selected(source, cut)[0] for source in sources}
        return counts

    def competitions(self, targets: Targets, head_numel: int = 0) -> list[Competition]:
        """The groups, each with its modules and units.

        Raises:
            ValueError: a group without a unit, with more than its modules have, or with units of several sizes.
        """
        members: dict[str, list[str]] = {pattern: [] for pattern in self.groups}
        for name in targets.grids:
            pattern = targets.find(self.groups, name)
            if pattern is not None:
                members[pattern].append(name)
        return [
            Competition(tuple(names), self._units(pattern, {name: targets.grids[name] for name in names}, targets), 0)
            for pattern, names in members.items()
            if names
        ]

    def _units(self, pattern: str, grids: dict[str, UnitGrid], targets: Targets) -> int:
        wanted, available = self.groups[pattern], sum(grid.num_units for grid in grids.values())
        if isinstance(wanted, float):
            sizes = {grid.unit_numel for grid in grids.values()}
            if len(sizes) > 1:
                raise ValueError(
                    f"GlobalByGroup.groups['{pattern}'] ranks units of {sorted(sizes)} entries together. Give each "
                    "size a group of its own, or use units of one size, e.g. blocks."
                )
            entries = targets.model_entries() if self.of == "model" else sum(g.rows * g.cols for g in grids.values())
            wanted = UnitGrid(1, entries).count_for_density(wanted) // sizes.pop()
        if not 1 <= wanted <= available:
            raise ValueError(
                f"GlobalByGroup.groups['{pattern}']={self.groups[pattern]} of the {self.of} makes {wanted} units, and "
                f"its {len(grids)} modules have {available}. It takes 1 to {available}: change it, or the block_size."
            )
        return wanted
