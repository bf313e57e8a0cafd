"""What is told of a run's memory: parts, what ranks send, and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..utils.tables import Table, table
from .communication import Traffic
from .dry_run import CONSTANTS, FROZEN, INDICES, STATE, VALUES, WEIGHTS
from .memory_trace import ADAPTER, GRADIENTS, LOGITS, NETWORK, WORKING
from .sharding import BUCKETS, GATHERED, MASTERS

RESERVE = 1 << 30
"""Held back of a GPU for its context, its libraries and gaps between blocks. Assumed, not measured."""
LABELS = {
    WEIGHTS: "base weights",
    CONSTANTS: "quantisation constants",
    VALUES: "adapter values",
    INDICES: "indices",
    FROZEN: "frozen parts of the adapter",
    STATE: "state of rules",
    MASTERS: "fp32 copies of values",
    "optimizer": "optimizer state",
    GRADIENTS: "gradients",
    NETWORK: "kept by the frozen network",
    ADAPTER: "kept by adapted layers",
    LOGITS: "logits and loss",
    WORKING: "working memory",
    "move": "dense gradient at a move",
    GATHERED: "gathered layers of the base",
    BUCKETS: "buckets of collectives",
}
"""Kinds of memory, in the order of the table."""


@dataclass(frozen=True)
class Part:
    """Memory of one kind."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """What training would take; bytes are those of the highest point of a step."""

    model: str
    """The model's class."""
    method: str
    """The method's name, or the config's class."""
    options: dict[str, Any]
    """Bits, batch, seq, optimizer, gradient_checkpointing, processes, sharding, and what `fit` chose."""
    base_numbers: int
    """Numbers of the base, each once, however they are stored."""
    trained_numbers: int
    """Numbers that train."""
    modules: int
    """Adapted modules."""
    parts: tuple[Part, ...]
    """What makes up `training`."""
    kept: int
    """Bytes between the forward and the backward pass: activations, logits."""
    saved: int
    """Of it, what autograd saved for the backward pass."""
    training: int
    """Bytes at the highest point of a step."""
    calibration: int
    """Bytes at the highest point of choosing a start from data; 0 for methods that do not."""
    gpu: int | None
    """Bytes of the GPU that was asked about."""
    assumptions: tuple[str, ...]
    """What was taken for granted."""
    warnings: tuple[str, ...]
    """What was said when the adapter was made."""
    traffic: tuple[Traffic, ...] = ()
    """What the ranks send each other, of several processes."""

    @property
    def total(self) -> int:
        """Bytes at the highest point of the run."""
        return max(self.training, self.calibration)

    @property
    def fits(self) -> bool | None:
        """Whether that and `RESERVE` fit into the GPU; None where none was named."""
        return None if self.gpu is None else self.total + RESERVE <= self.gpu

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {**asdict(self), "total": self.total, "fits": self.fits}

    def table(self) -> Table:
        """The parts, in MiB."""
        rows = [(part.name, _mib(part.bytes), f"{part.bytes / self.training:.1%}") for part in self.parts]
        rows.append(("training, at its highest", _mib(self.training), "100.0%"))
        if self.calibration:
            share = f"{self.calibration / self.training:.1%}"
            rows.append(("before it, choosing from data", _mib(self.calibration), share))
        if self.gpu is not None:
            verdict = "fits" if self.fits else "does not fit"
            rows.append((f"GPU, {_mib(RESERVE)} MiB of it held back", _mib(self.gpu), verdict))
        made = table(("memory", "MiB", "share"), rows)
        for column in made.columns[1:]:
            column.justify = "right"
        return made

    def traffic_table(self) -> Table:
        """Collectives of a step and of a move, and what one rank sends in rings, in MiB."""
        ranks = self.options.get("processes", 1)
        rows = [
            (one.when, one.what, one.collective, str(one.count), _mib(one.bytes), _mib(one.sent(ranks)))
            for one in self.traffic
        ]
        made = table(("each", "what", "collective", "number", "MiB", "sent by a rank, MiB"), rows)
        for column in made.columns[3:]:
            column.justify = "right"
        return made

    @property
    def headline(self) -> str:
        """What was estimated."""
        about = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.method} on {self.model}: {about}"

    @property
    def summary(self) -> str:
        """How many numbers train, and what was taken for granted or warned of, a line each."""
        share = self.trained_numbers / self.base_numbers
        trains = f"{self.trained_numbers:,} numbers train in {self.modules} modules, {share:.3%} of the base's "
        lines = [f"{trains}{self.base_numbers:,}.", *(f"- {line}" for line in (*self.assumptions, *self.warnings))]
        return "\n".join(lines)

    def __str__(self) -> str:
        tables = [self.table(), *([self.traffic_table()] if self.traffic else [])]
        return "\n\n".join(map(str, (self.headline, *tables, self.summary)))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
