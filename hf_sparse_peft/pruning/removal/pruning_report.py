"""What a pruning walk did."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...utils.tables import Table, table
from ..criteria.one_shot_methods import PruningMethod
from ..criteria.pruning_patterns import PruningPattern
from ..units.kept_units import KeptUnits
from ..units.structure import CHANNELS, HEADS


@dataclass
class PruningReport:
    """What `prune_model` did."""

    method: PruningMethod
    pattern: PruningPattern | tuple[PruningPattern, ...]
    """Several where heads and channels went together."""
    entries: dict[str, int] = field(default_factory=dict)
    """Entries of each pruned weight."""
    zeros: dict[str, int] = field(default_factory=dict)
    """Entries of it that are 0 now."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    """What was removed from each weight: bits (`sparsity.unpack_bits(mask, entries)`), on the CPU."""
    kept: KeptUnits | None = None
    """Heads and channels that each block keeps, where such units were pruned."""
    importance: dict[str, float] = field(default_factory=dict)
    """Importance of each block, where the method allots by it (CFSP)."""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned weights."""
        return sum(self.zeros.values()) / max(sum(self.entries.values()), 1)

    def table(self) -> Table:
        """A row a weight: entries, zeros, sparsity. Where units were pruned, a row a block: heads and channels that are
        gone, of how many, and the sparsity of all its pruned weights."""
        totals = (sum(self.entries.values()), sum(self.zeros.values()), self.sparsity)
        if self.kept is None:
            rows = [(name, count, self.zeros[name], self.zeros[name] / count) for name, count in self.entries.items()]
            return table(("weight", "entries", "zeros", "sparsity"), rows, totals=("all", *totals))
        rows = []
        for block, kept in self.kept.blocks.items():
            own = [name for name in self.entries if name.startswith(f"{block}.")]
            entries, zeros = sum(self.entries[name] for name in own), sum(self.zeros[name] for name in own)
            gone = [_share(len(kept.removed(kind)), kept.all_units(kind)) for kind in (HEADS, CHANNELS)]
            rows.append((block, *gone, entries, zeros, zeros / max(entries, 1)))
        gone = [
            _share(sum(len(kept.removed(kind)) for kept in self.kept.blocks.values()),
                   sum(kept.all_units(kind) for kept in self.kept.blocks.values()))
            for kind in (HEADS, CHANNELS)
        ]  # fmt: skip
        heads = ("block", "heads gone", "channels gone", "entries", "zeros", "sparsity")
        return table(heads, rows, totals=("all", *gone, *totals))


def _share(gone: int, units: int) -> str | None:
    return f"{gone} of {units}" if units else None
