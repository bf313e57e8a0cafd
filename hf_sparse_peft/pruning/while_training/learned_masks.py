"""What trained gates have masked."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.tables import Table, table
from ..units.kept_units import KeptUnits
from ..units.structure import CHANNELS, HEADS, Kind
from ..units.unit_masks import UnitMasks
from .unit_hard_concrete import UnitGates


@dataclass(frozen=True)
class LearnedMasks:
    """What is left, and how much is gone."""

    kept: KeptUnits
    """For `slice_model`; of a part that is closed one unit, which its masks close."""
    closed: list[tuple[str, Kind]]
    """Blocks of which all heads, or all channels, are gone."""
    entries: dict[str, tuple[int, int]]
    """Weights of a block that belong to units, and how many of them are gone."""
    expected: float
    """Sparsity that the gates were expected to give when masks became hard."""

    @property
    def sparsity(self) -> float:
        """Fraction of the weights of heads and channels that is gone."""
        return sum(gone for _, gone in self.entries.values()) / sum(count for count, _ in self.entries.values())

    def table(self) -> Table:
        """A row a block: heads and channels that are gone, of how many, and the sparsity of its weights."""
        rows = []
        for block, kept in self.kept.blocks.items():
            cells = []
            for kind in (HEADS, CHANNELS):
                total = kept.all_units(kind)
                left = 0 if (block, kind) in self.closed else len(kept.units(kind))
                cells.append(f"{total - left} of {total}")
            count, gone = self.entries[block]
            rows.append((block, *cells, count, gone, gone / count))
        counts = [sum(column) for column in zip(*self.entries.values(), strict=True)]
        heads = ("block", "heads gone", "channels gone", "weights", "gone", "sparsity")
        return table(heads, rows, totals=("all", None, None, *counts, self.sparsity))


def learned_masks(masks: UnitMasks, gates: list[UnitGates], expected: float) -> LearnedMasks:
    """What `masks` remove, whose units have these gates."""
    entries: dict[str, tuple[int, int]] = {}
    for one in gates:
        count, gone = entries.get(one.space.name, (0, 0))
        masked = one.space.size - one.space.count
        entries[one.space.name] = (count + one.entries * one.space.size, gone + one.entries * masked)
    return LearnedMasks(masks.kept(), masks.closed(), entries, expected)
