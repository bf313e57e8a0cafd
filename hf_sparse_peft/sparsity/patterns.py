"""Patterns: in which shape the units of a support may lie in their weight.

A pattern is a part; anybody may register one:

    @register_part("first_rows")
    @dataclass(frozen=True)
    class FirstRows(Pattern):
        '''Units of the first half of the rows.'''

        def capacity(self, grid): return grid.num_units // 2
        def region(self, scores, grid, kept=None, seed=0): return Region(torch.arange(self.capacity(grid)), grid)

A support is chosen in two steps, with every score alike: the pattern says by all scores which units it allows
(`region`), then the best of these are taken. For N:M a region is the N best of every M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.option_types import Fraction, PositiveFraction
from ..utils.parts import Part, register_part
from .selection import ScoreSlabs, random_units, random_units_outside, rereadable, stream_seed, tie_priority
from .subgrid import best_subgrid
from .support import UnitGrid

Chunks = Callable[[], Iterable[Tensor]]


class Region:
    """Units that a pattern allows: `units`, sorted int64 `[n]`, of a weight that is cut as `grid`."""

    def __init__(self, units: Tensor, grid: UnitGrid) -> None:
        self.units, self.grid = units, grid

    @property
    def size(self) -> int:
        """How many they are."""
        return self.units.numel()

    def contains(self, units: Tensor) -> Tensor:
        """Bool `[k]`: which of `units` are in it."""
        own = self.units.to(units.device)
        return own[torch.searchsorted(own, units.long()).clamp_max(self.size - 1)] == units

    def masked(self, chunks: ScoreSlabs) -> Chunks:
        """`chunks` with the scores of all other units at minus infinity, as copies. `top_units` takes none of these as
        long as it is asked for no more than `size`."""
        chunks = rereadable(chunks)
        if self.size == self.grid.num_units:
            return chunks

        def within() -> Iterator[Tensor]:
            start = 0
            for chunk in chunks():
                bounds = torch.tensor([start, start + chunk.numel()], device=self.units.device)
                first, last = torch.searchsorted(self.units, bounds).tolist()
                at = (self.units[first:last] - start).to(chunk.device)
                start += chunk.numel()
                yield torch.full_like(chunk, -torch.inf).index_copy_(0, at, chunk[at])

        return within

    def random_units(self, k: int, generator: torch.Generator, taken: Tensor | None = None) -> Tensor:
        """`k` units of it that are not in `taken` (sorted, distinct), every such set equally likely; sorted, of the
        grid's dtype.

        Raises:
            ValueError: it has fewer.
        """
        if taken is None:
            places = random_units(self.size, k, generator)
        else:
            own = self.units.to(taken.device)
            inside = torch.searchsorted(own, taken[self.contains(taken)].long())
            places = random_units_outside(self.size, inside, k, generator)
        return self.units[places.long().to(self.units.device)].to(self.grid.index_dtype)


@dataclass(frozen=True)
class Pattern(Part):
    """Base of the patterns."""

    part_kind: ClassVar[str] = "pattern"

    reads_weight: ClassVar[bool] = False
    """Whether the units that it allows follow from the weight (`on`): a choice by data cannot keep to it."""

    def on(self, weight: Callable[[], Tensor]) -> Pattern:
        """The pattern on a weight `[rows, cols]`, which is read when it is asked for."""
        return self

    def check_grid(self, grid: UnitGrid, name: str = "") -> None:
        """Refuse a weight that the pattern does not fit; names the module `name`.

        Raises:
            ValueError: it does not.
        """

    def capacity(self, grid: UnitGrid) -> int:
        """Most units that a support of this pattern may have."""
        raise NotImplementedError

    def region(self, scores: Tensor, grid: UnitGrid, kept: Tensor | None = None, seed: int = 0) -> Region:
        """The units that a support may have by `scores` (`[num_units]`, finite) which has the units `kept` (sorted)."""
        raise NotImplementedError

    def random_region(self, grid: UnitGrid, seed: int, kept: Tensor | None = None) -> Region:
        """A random one that holds `kept`."""
        drawn = torch.rand(grid.num_units, generator=torch.Generator().manual_seed(stream_seed(seed, "region")))
        return self.region(drawn if kept is None else drawn.to(kept.device), grid, kept, seed)

    def leaving(self, units: Tensor, importance: Tensor, count: int, grid: UnitGrid, seed: int) -> Tensor:
        """Bool `[n]`: which of `units` (sorted) leave first at a move that drops `count` of them, at most `count`, so
        that the pattern can move; none unless a pattern says so. `importance` `[n]`: large is to stay."""
        return torch.zeros(units.numel(), dtype=torch.bool, device=units.device)

    def check_units(self, units: Tensor, grid: UnitGrid, name: str = "") -> None:
        """Refuse a support that does not keep to the pattern; names the module or tensor `name`.

        Raises:
            ValueError: it does not.
        """

    def check_count(self, count: int, grid: UnitGrid, name: str) -> None:
        """Refuse a support of `count` units in the module `name` if the pattern has fewer places.

        Raises:
            ValueError: names both.
        """
        if count > self.capacity(grid):
            raise ValueError(
                f"pattern={self} has {self.capacity(grid)} places in the {grid.rows}x{grid.cols} weight of '{name}', "
                f"and its support wants {count} {grid.granularity} units. Enlarge the pattern, or lower the budget."
            )


@register_part("grid")
@dataclass(frozen=True)
class Grid(Pattern):
    r"""All units lie where some rows R and some columns C of the weight cross, so that their gradient is read from
    :math:`dY_{:,R}^\top X_{:,C}`.

    :math:`|R|` and :math:`|C|` are these fractions of the sides, rounded up, so that every density up to
    `rows * columns` fits. First R and C are chosen by the sums of the score (`sparsity.best_subgrid`), then the best
    units inside; random supports draw both. Blocks lie in rows and columns of blocks. `Grid(1, 1)` is the free choice.

    The grid moves with the support. Units that survive a move stay, and so do their rows and columns; all others are
    chosen anew by the score of the growth. So that some are free in a grid with many units, part of the units that a
    move drops leave as whole rows and columns, those with the least importance in sum: at most `turnover / 2` of them
    by rows and as many by columns. A growth that reads gradients before its move chooses the grid at that time, from
    what would survive then.
    """

    rows: PositiveFraction = 0.25
    """Fraction of the weight's rows."""
    columns: PositiveFraction = 0.25
    """Fraction of the weight's columns."""
    turnover: Fraction = 0.5
    """Fraction of the units that a move drops which may leave as whole rows and columns; 0: a row or column makes room
    only when all of its units happened to leave."""

    def check_grid(self, grid: UnitGrid, name: str = "") -> None:
        """Entries or blocks."""
        if grid.granularity not in ("entry", "block"):
            raise ValueError(
                f"pattern={self} is for entries and blocks, and '{name}' has granularity '{grid.granularity}'. Set "
                "granularity='entry' or 'block', or pattern=None."
            )

    def sides(self, grid: UnitGrid) -> tuple[int, int]:
        """How many rows and columns (of units) it has."""
        down, across = _lattice(grid)
        return _lines(self.rows, down), _lines(self.columns, across)

    def capacity(self, grid: UnitGrid) -> int:
        """Crossings."""
        rows, columns = self.sides(grid)
        return rows * columns

    def region(self, scores: Tensor, grid: UnitGrid, kept: Tensor | None = None, seed: int = 0) -> Region:
        """The crossings of the best sub-grid that holds `kept`."""
        down, across = _lattice(grid)
        if self.sides(grid) == (down, across):
            return Region(torch.arange(grid.num_units, device=scores.device), grid)
        held = {}
        if kept is not None and kept.numel():
            held = {"kept_rows": torch.unique(kept // across), "kept_columns": torch.unique(kept % across)}
        rows, columns = best_subgrid(scores.view(down, across), *self.sides(grid), **held, seed=seed)
        return Region((rows.long()[:, None] * across + columns.long()).reshape(-1), grid)

    def random_region(self, grid: UnitGrid, seed: int, kept: Tensor | None = None) -> Region:
        """Random rows crossing random columns."""
        across, sides = _lattice(grid)[1], []
        held = (None, None) if kept is None else (torch.unique(kept // across), torch.unique(kept % across))
        for what, number, there, lines in zip(("rows", "columns"), self.sides(grid), _lattice(grid), held, strict=True):
            drawn = torch.Generator().manual_seed(stream_seed(seed, "pattern", what))
            lines = torch.empty(0, dtype=torch.int64) if lines is None else lines.long().cpu()
            more = random_units_outside(there, lines, number - lines.numel(), drawn)
            sides.append(torch.cat([lines, more]).sort().values)
        return Region((sides[0][:, None] * across + sides[1]).reshape(-1), grid)

    def leaving(self, units: Tensor, importance: Tensor, count: int, grid: UnitGrid, seed: int) -> Tensor:
        """Those of the rows, and of the columns, with the least importance."""
        leave = torch.zeros(units.numel(), dtype=torch.bool, device=units.device)
        if count >= units.numel():
            return leave
        across, most = _lattice(grid)[1], int(self.turnover * count) // 2
        lines_of = (units // across, units % across)
        for lines, number, there in zip(lines_of, self.sides(grid), _lattice(grid), strict=True):
            if number < there:
                leave |= _weakest_lines(lines, importance, most, seed)
        return leave

    def check_units(self, units: Tensor, grid: UnitGrid, name: str = "") -> None:
        """No more rows and columns than it has."""
        across = _lattice(grid)[1]
        found = tuple(torch.unique(lines).numel() for lines in (units // across, units % across))
        sides = self.sides(grid)
        if found[0] > sides[0] or found[1] > sides[1]:
            raise ValueError(
                f"The units of '{name}' lie in {found[0]} rows and {found[1]} columns, and pattern={self} has "
                f"{sides[0]} and {sides[1]} of them. Choose units inside (Pattern.region), or set pattern=None."
            )


def _lattice(grid: UnitGrid) -> tuple[int, int]:
    """Rows and columns that units lie in."""
    side = grid.block_size if grid.granularity == "block" else 1
    return grid.rows // side, grid.cols // side


def _lines(fraction: float, there: int) -> int:
    """`ceil(fraction * there)`, where a product within float error of an integer is that integer."""
    exact = fraction * there
    return round(exact) if abs(exact - round(exact)) <= 1e-9 * exact else math.ceil(exact)


def _weakest_lines(lines: Tensor, importance: Tensor, most: int, seed: int) -> Tensor:
    """Bool `[n]`: the units of the lines with the smallest sums of importance, as many whole lines as have at most
    `most` units together. Ties are drawn for."""
    names, owner, numbers = torch.unique(lines, return_inverse=True, return_counts=True)
    sums = torch.zeros_like(names, dtype=torch.float64).index_add_(0, owner, importance.double())
    drawn = tie_priority(seed, names).argsort()
    order = drawn[sums.float()[drawn].argsort(stable=True)]
    weak = torch.zeros_like(names, dtype=torch.bool)
    weak[order] = numbers[order].cumsum(0) <= most
    return weak[owner]


class Everywhere(Region):
    """All units of a grid, none of which is listed."""

    def __init__(self, grid: UnitGrid) -> None:
        self.grid = grid

    @property
    def size(self) -> int:
        """All of them."""
        return self.grid.num_units

    def contains(self, units: Tensor) -> Tensor:
        """Every one."""
        return torch.ones(units.numel(), dtype=torch.bool, device=units.device)

    def masked(self, chunks: ScoreSlabs) -> Chunks:
        """As they are."""
        return rereadable(chunks)

    def random_units(self, k: int, generator: torch.Generator, taken: Tensor | None = None) -> Tensor:
        """As `Region.random_units`."""
        if taken is None:
            return random_units(self.size, k, generator)
        return random_units_outside(self.size, taken, k, generator)


def region_of(
    pattern: Pattern | None, scores: ScoreSlabs, grid: UnitGrid, kept: Tensor | None = None, seed: int = 0
) -> Region:
    """The region of `pattern` by score chunks of all units, of which a copy is held meanwhile; None: every unit.

    `kept` (sorted) are among them. Ties are drawn for with `seed`.
    """
    if pattern is None:
        return Everywhere(grid)
    return pattern.region(_whole(rereadable(scores)()), grid, kept, stream_seed(seed, "pattern"))


def _whole(chunks: Iterable[Tensor]) -> Tensor:
    return torch.cat([chunk.reshape(-1) for chunk in chunks])
