"""Rows of `learning.py`: a file of lines, and what the runs of a candidate come to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SETTING = ("task", "bits", "steps", "batch_size", "rank", "examples", "test_examples", "base")
"""Options that tell cases apart."""
CASE = (*SETTING, "weights")
"""What tells cases apart: only runs that agree in all of these are compared. `weights` is a digest of the base's file:
one that was pretrained again, on another machine, is another base of the same name."""
KEY = ("candidate", "method", "learning_rate", "seed", *CASE)


class JsonLines:
    """Rows of a file, one JSON object a line, that several processes may append to."""

    def __init__(self, path: Path, setting: Row, machine: Row, again: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.setting, self.machine, self.again = path, setting, machine, again

    def read(self) -> list[Row]:
        """All rows, of equal keys the last one; a line that a process was killed in is left out."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return list({json.dumps([row.get(name) for name in KEY]): row for row in rows}.values())

    def measure(self, work: Callable[[], Row], **key: Any) -> Row:
        """The row of that key in this setting: the file's (unless `again`), or a new one."""
        key |= self.setting
        for row in [] if self.again else self.read():
            if {**row, **key} == row:
                return row
        row = {**key, **work(), "machine": self.machine}
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:  # one write: lines of several processes do not mix
            os.write(file, (b"\n" if torn else b"") + (json.dumps(row) + "\n").encode())
        finally:
            os.close(file)
        print({name: value for name, value in row.items() if name not in ("machine", *self.setting)}, flush=True)
        return row


def weights_of(base: str | Path) -> str:
    """The first digits of a digest of the weights in a folder; empty for a name on the Hub."""
    digest = hashlib.sha256()
    files = sorted(Path(base).glob("*.safetensors"))
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8] if files else ""


def command_of(row: Row) -> list[str]:
    """The words of the command that measures a row again; DATA, ENCODER and a base's name stand for their folders."""
    words = ["python", "recipes/benchmarks/learning.py"]
    for name in SETTING[:-1]:
        words += [f"--{name}", str(row[name])]
    words += ["--base", row["base"]] if row["base"] else []
    words += ["--data", "DATA"] if row["task"] in ("e2e", "cola", "sst2") else []
    words += ["--encoder", "ENCODER"] if row["task"] in ("cola", "sst2") else []
    return [*words, "--candidates", row["candidate"], "--rates", str(row["learning_rate"]), "--seeds", str(row["seed"])]


def quality(row: Row) -> tuple[float, float]:
    """What the better of two runs has more of: `choose`, then minus the mean training loss."""
    return row["choose"], -row["train_loss"]


@dataclass(frozen=True)
class Sweep:
    """All runs of one candidate in one case."""

    name: str
    rows: list[Row]

    @cached_property
    def by_rate(self) -> dict[float, list[Row]]:
        """Learning rate -> runs, one a seed in their order."""
        if len({row.get("method") for row in self.rows}) > 1:
            raise ValueError(f"rows of '{self.name}' are of different methods; keep those of one.")
        found: dict[float, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: (row["learning_rate"], row["seed"])):
            found.setdefault(row["learning_rate"], []).append(row)
        return found

    @cached_property
    def best(self) -> list[Row]:
        """The runs of all seeds at the rate whose mean `choose` is the highest, of the rates with the most seeds."""
        most = max(map(len, self.by_rate.values()))
        full = [found for found in self.by_rate.values() if len(found) == most]
        return max(full, key=lambda found: [statistics.mean(pair) for pair in zip(*map(quality, found), strict=True)])

    @property
    def rate(self) -> float:
        """The best learning rate."""
        return self.best[0]["learning_rate"]

    @property
    def inner(self) -> bool:
        """Whether rates on both sides of the best one were tried."""
        return min(self.by_rate) < self.rate < max(self.by_rate)

    @cached_property
    def smooth_rate(self) -> float:
        """Where a parabola through the test losses at the best rate and its neighbours has its lowest point, in log2 of
        the rate; the best rate itself where there is none between the neighbours."""
        rates = sorted(self.by_rate)
        at = rates.index(self.rate)
        if not 0 < at < len(rates) - 1:
            return self.rate
        left, middle, right = (statistics.mean(self.column("test_loss", rates[at + d])) for d in (-1, 0, 1))
        bend = left - 2 * middle + right
        shift = (left - right) / (2 * bend) if bend > 0 else 0.0
        return self.rate * 2.0 ** max(-1.0, min(1.0, shift))

    def column(self, key: str, rate: float | None = None) -> list[float]:
        """A figure of the runs at one rate, the best one by default; none where they have none."""
        rows = self.best if rate is None else self.by_rate.get(rate, [])
        return [row[key] for row in rows if key in row]


def cases(rows: Iterable[Row]) -> dict[tuple, dict[str, Sweep]]:
    """Setting (`CASE`, in its order) -> candidate -> its sweep."""
    found: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        key = tuple(row[name] for name in CASE)
        found.setdefault(key, {}).setdefault(row["candidate"], []).append(row)
    return {key: {name: Sweep(name, runs) for name, runs in sweeps.items()} for key, sweeps in found.items()}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error over the values, i.e. the seeds, alone (nan for one value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def paired(one: Sweep, other: Sweep, key: str = "score") -> tuple[float, float]:
    """Mean difference of two candidates over the seeds that both have, and its standard error; each is at the rate that
    is best over these seeds: one that was chosen on more of them would be at a disadvantage.

    Raises:
        ValueError: they have no seed in common.
    """
    shared = {row["seed"] for row in one.best} & {row["seed"] for row in other.best}
    if not shared:
        raise ValueError(f"'{one.name}' and '{other.name}' have no seed in common at their best rates.")
    ours, theirs = (
        {row["seed"]: row[key] for row in Sweep(sweep.name, [r for r in sweep.rows if r["seed"] in shared]).best}
        for sweep in (one, other)
    )
    return mean_and_error([ours[seed] - theirs[seed] for seed in sorted(ours)])
