"""How well methods learn at equal trained numbers: a sweep of learning rates for each, three seeds, spread shown.

    python recipes/benchmarks/learning.py --task words                     # all candidates; hours on one CPU core
    python recipes/benchmarks/learning.py --task sst2 --encoder PATH --data PATH --candidates lora hybrid
    python recipes/benchmarks/learning.py --task words --candidates 'spiel-ag:density=0.02' --rates 3e-3 --seeds 0
    python recipes/benchmarks/learning.py --task words --plan              # trained numbers only, nothing is trained
    python recipes/benchmarks/learning_report.py runs/learning/learning.jsonl    # tables and pictures

The protocol. All candidates (`learning_candidates.py`; harness.py says how others are written) train the numbers of
LoRA r=`--rank` on all targeted linears, head apart, for equally many steps of equal batches (AdamW, cosine to 0, a
twentieth of warm-up). Each has 7 learning rates, a factor of 2 apart, with the first seed; while the best is the first
or the last of them, the sweep goes on there, three more rates at most. Then the other seeds run at the best rate and
its two neighbours. A rate is the better, the higher the mean of `choose`, a figure on one half of the test examples;
what is compared is `score`, that on the other half, at the rate that is best over all seeds. A run whose training loss
rises (`learning_runs.StopHopeless`) ends early and keeps the score that it has then.

A run is a line of `learning.jsonl` in `--output`; one that is there is not repeated, so a sweep that was stopped goes
on where it was, and several processes may share the file, each with its `--part`.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import harness
from harness import option
from learning_candidates import CANDIDATES, find
from learning_runs import adapted, budget, run, trained_numbers
from learning_tasks import TASKS

SWEEP, MORE = 7, 3
"""Rates of a sweep, and how many more there may be beyond its ends."""


@dataclass
class Case:
    """A task at one size: what options that are 0 stand for."""

    steps: int
    batch_size: int
    rank: int
    examples: int
    test_examples: int
    rate: float
    """Factor on the candidates' rates."""


CASES = {
    "words": Case(100, 16, 4, 3000, 800, 1.0),
    "e2e": Case(150, 8, 4, 3000, 200, 1.0),
    "sst2": Case(60, 12, 8, 1000, 600, 0.25),
    "cola": Case(150, 16, 8, 0, 527, 0.25),
}


@dataclass
class LearningOptions(harness.Options):
    """Options of this benchmark."""

    task: Literal["words", "e2e", "cola", "sst2"] = option("words", "what to learn")
    candidates: list[str] = option([], "by default all")
    rates: list[float] = option([], "learning rates; by default the sweep of the protocol")
    seeds: list[int] = option([0, 1, 2], "seeds of the data, the supports and the factors")
    bits: Literal["fp32", "nf4"] = option("fp32", "base weights")
    steps: int = option(0, "optimizer steps of a run; 0: the task's")
    batch_size: int = option(0, "examples of a step; 0: the task's")
    rank: int = option(0, "rank of the LoRA whose trained numbers all get; 0: the task's")
    examples: int = option(0, "training examples; 0: the task's")
    test_examples: int = option(0, "test examples, in two halves; 0: the task's")
    base: Path | None = option(None, "causal language model, for words and e2e; by default recipes/demo_base")
    encoder: Path | None = option(None, "encoder, for cola and sst2")
    data: Path | None = option(None, "folder with the folders cola, sst2, e2e and gsm8k of real data")
    part: list[int] = option([0, 1], "I N: every N-th candidate from the I-th on")
    plan: bool = option(False, "print the trained numbers of each candidate, and train nothing")


class JsonLines:
    """Rows of a file, one JSON object a line, that several processes may append to."""

    def __init__(self, path: Path, setting: dict[str, Any], machine: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.setting, self.machine = path, setting, machine

    def read(self) -> list[dict[str, Any]]:
        """All rows; a line that a process was killed in is left out."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def measure(self, work: Any, **key: Any) -> dict[str, Any]:
        """The row of that key in this setting: the file's, or a new one."""
        key |= self.setting
        for row in self.read():
            if {**row, **key} == row:
                return row
        row = {**key, **work(), "machine": self.machine}
        line = (json.dumps(row) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)  # one write: lines of several processes do not mix
        finally:
            os.close(file)
        print({name: value for name, value in row.items() if name not in ("machine", *self.setting)}, flush=True)
        return row


def grid(middle: float, count: int = SWEEP) -> list[float]:
    """Learning rates a factor of 2 apart around `middle`, of three digits."""
    return [float(f"{middle * 2.0 ** (place - count // 2):.3g}") for place in range(count)]


def better(row: dict[str, Any]) -> tuple[float, float]:
    """What the better of two runs has more of: `choose`, then minus the mean training loss."""
    return row["choose"], -row["train_loss"]


def sweep(measure: Any, middle: float, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Rows of one candidate by the protocol: `measure(rate, seed)` gives one."""
    rows = {rate: measure(rate, seeds[0]) for rate in grid(middle)}
    best = max(rows, key=lambda rate: better(rows[rate]))
    for _ in range(MORE):
        if min(rows) < best < max(rows):
            break
        rate = float(f"{best * (2 if best == max(rows) else 0.5):.3g}")
        rows[rate] = measure(rate, seeds[0])
        best = max(rows, key=lambda rate: better(rows[rate]))
    yield from rows.values()
    rates = sorted(rows)
    at = rates.index(best)
    for seed in seeds[1:]:
        for rate in rates[max(at - 1, 0) : at + 2]:
            yield measure(rate, seed)


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of all seeds at the rate whose mean `choose` is the highest, of the rates with the most seeds."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for row in rows:
        by_rate.setdefault(row["learning_rate"], []).append(row)
    most = max(map(len, by_rate.values()))
    full = [found for found in by_rate.values() if len(found) == most]
    return max(full, key=lambda found: [statistics.mean(pair) for pair in zip(*map(better, found), strict=True)])


def settle(options: LearningOptions) -> Case:
    """Put the task's sizes where the options leave them open."""
    case = CASES[options.task]
    for name in ("steps", "batch_size", "rank", "examples", "test_examples"):
        setattr(options, name, getattr(options, name) or getattr(case, name))
    return case


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the sweeps; returns their rows."""
    options = harness.parse(LearningOptions, __doc__, argv)
    case = settle(options)
    task = TASKS[options.task](options)
    numbers = budget(task, options.rank, options.steps)
    names = ("task", "bits", "steps", "batch_size", "rank", "examples", "test_examples")
    setting = {name: getattr(options, name) for name in names} | {"base": options.base and options.base.name}
    folder = options.output or Path("runs/learning")
    lines = JsonLines(folder / "learning.jsonl", setting, harness.machine(options.device))
    found = []
    first, every = options.part
    for name in (options.candidates or list(CANDIDATES))[first::every]:
        candidate = find(name)
        if options.plan:
            _, model = adapted(candidate.text, task, numbers, options.seeds[0])
            print(f"{name:24} {trained_numbers(model, task):>12,}  {candidate.text}")
            continue

        def measure(rate: float, seed: int, name: str = name, text: str = candidate.text) -> dict[str, Any]:
            work = partial(run, text, task, options, numbers, rate, seed)
            return lines.measure(work, candidate=name, method=text, learning_rate=rate, seed=seed)

        if options.rates:
            found += [measure(rate, seed) for seed in options.seeds for rate in options.rates]
        else:
            found += sweep(measure, candidate.rate * case.rate, options.seeds)
    return found


if __name__ == "__main__":
    main()
