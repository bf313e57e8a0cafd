"""How well methods learn at equal trained numbers: a sweep of learning rates for each, 3 or 6 seeds, spread shown.

    python recipes/benchmarks/learning.py --task words                     # all candidates; hours on one CPU core
    python recipes/benchmarks/learning.py --task sst2 --encoder PATH --data PATH --candidates lora sparse-lora
    python recipes/benchmarks/learning.py --task words --candidates 'spiel-ag:density=0.02' --rates 3e-3 --seeds 0
    python recipes/benchmarks/learning.py --task words --plan              # trained numbers only, nothing is trained
    python recipes/benchmarks/learning_report.py                           # tables and pictures of all rows

The protocol. All candidates (`learning_candidates.py`; harness.py says how others are written) train the numbers of
LoRA r=`--rank` on all targeted linears, head apart, for equally many steps of equal batches (AdamW, cosine to 0, a
twentieth of warm-up); full fine-tuning is the exception, and where a method has a schedule or numbers of its own,
`learning_candidates.py` says so. Batches are grouped by length, so that within each 50 of them the longest come first.
Each candidate has 7 learning rates, a factor of 2 apart, with the first seed; while the best is the first or the last
of them, the sweep goes on there, three more rates at most. Then the other seeds run at the best rate and its two
neighbours, and further where the mean over all seeds asks for it. A rate is the better, the higher the mean of
`choose`, a figure on one half of the test examples; what is compared is `score`, that on the other half, at the rate
that is best over all seeds. A run whose training loss rises (`learning_runs.StopHopeless`) ends early and keeps the
score that it has then.

A run is a line of `learning.jsonl` in `--output`; one that is there is not repeated, so a sweep that was stopped goes
on where it was, and several processes may share the file, each with its `--part`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import harness
from harness import option
from learning_candidates import CANDIDATES, find
from learning_hub_tasks import TASKS
from learning_rows import SETTING, JsonLines, quality, weights_of
from learning_runs import adapted, budget, run, trained_numbers

from hf_sparse_peft import methods

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
    seeds: int = 3
    """Seeds of the data, the supports and the factors."""


CASES = {
    "words": Case(100, 16, 4, 3000, 800, 1.0, seeds=6),
    "two-tasks": Case(100, 16, 4, 3000, 400, 1.0),
    "e2e": Case(100, 8, 4, 3000, 200, 1.0),
    "sst2": Case(100, 12, 8, 1000, 600, 0.25),
    "cola": Case(250, 16, 8, 0, 527, 0.25),
    "gsm8k": Case(900, 16, 16, 0, 1319, 0.125),
    "metamath": Case(2000, 16, 16, 40_000, 1319, 0.125),
    "commonsense": Case(2000, 16, 16, 40_000, 2000, 0.125),
}


@dataclass
class CaseOptions(harness.Options):
    """Options that say what is learned."""

    task: Literal[tuple(TASKS)] = option("words", "what to learn")  # type: ignore[valid-type]
    bits: Literal["fp32", "bf16", "nf4"] = option("fp32", "base weights")
    steps: int = option(0, "optimizer steps of a run; 0: the task's")
    batch_size: int = option(0, "examples of a step; 0: the task's")
    rank: int = option(0, "rank of the LoRA whose trained numbers all get; 0: the task's")
    examples: int = option(0, "training examples; 0: the task's")
    test_examples: int = option(0, "test examples, in two halves; 0: the task's")
    base: str | None = option(None, "causal language model; by default recipes/demo_base, or Llama-3.2-1B")
    encoder: Path | None = option(None, "encoder, for cola and sst2")
    data: Path | None = option(None, "folder with the folders cola, sst2, e2e and gsm8k of real data")


@dataclass
class LearningOptions(CaseOptions):
    """Options of this benchmark."""

    candidates: list[str] = option([], "by default all")
    rates: list[float] = option([], "learning rates; by default the sweep of the protocol")
    seeds: list[int] = option([], "seeds of the data, the supports and the factors; by default the task's")
    part: list[int] = option([0, 1], "I N: every N-th candidate from the I-th on")
    plan: bool = option(False, "print the trained numbers of each candidate, and train nothing")


def grid(middle: float, count: int = SWEEP) -> list[float]:
    """Learning rates a factor of 2 apart around `middle`, of three digits."""
    return [float(f"{middle * 2.0 ** (place - count // 2):.3g}") for place in range(count)]


def next_rate(best: float, rates: list[float]) -> float:
    """The rate beyond the end of `rates` that is the best one; 0 where that lies between others."""
    if rates[0] < best < rates[-1]:
        return 0.0
    return float(f"{best * (2 if best == rates[-1] else 0.5):.3g}")


def sweep(measure: Any, middle: float, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Rows of one candidate by the protocol: `measure(rate, seed)` gives one."""
    rows = {rate: measure(rate, seeds[0]) for rate in grid(middle)}
    best = max(rows, key=lambda rate: quality(rows[rate]))
    for _ in range(MORE):
        if not (rate := next_rate(best, sorted(rows))):
            break
        rows[rate] = measure(rate, seeds[0])
        best = max(rows, key=lambda rate: quality(rows[rate]))
    yield from rows.values()
    yield from replicate(measure, rows, seeds)


def replicate(measure: Any, rows: dict[float, dict[str, Any]], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Other seeds at the best rate and its neighbours; as long as the mean over all seeds is the best at an end of the
    rates that have all seeds, at the next one too, `MORE` of them beyond the rates that were tried."""
    rates, full, more_rates = sorted(rows), {}, MORE
    at = rates.index(max(rows, key=lambda rate: quality(rows[rate])))
    low, high = max(at - 1, 0), min(at + 1, len(rates) - 1)
    while seeds[1:]:
        for rate in rates[low : high + 1]:
            if rate not in full:
                more = [measure(rate, seed) for seed in seeds[1:]]
                full[rate] = [quality(row) for row in (rows[rate], *more)]
                yield from more
        best = max(full, key=lambda rate: [statistics.mean(values) for values in zip(*full[rate], strict=True)])
        beyond = next_rate(best, rates)
        if beyond and more_rates:
            more_rates -= 1
            rows[beyond] = measure(beyond, seeds[0])
            yield rows[beyond]
            rates = sorted(rows)
            low, high = (0, high + 1) if beyond == rates[0] else (low, high + 1)
        elif best == rates[low] and low > 0:
            low -= 1
        elif best == rates[high] and high < len(rates) - 1:
            high += 1
        else:
            return


def fill_in_sizes(options: CaseOptions) -> Case:
    """Put the task's sizes where the options leave them open."""
    case = CASES[options.task]
    for name in ("steps", "batch_size", "rank", "examples", "test_examples"):
        setattr(options, name, getattr(options, name) or getattr(case, name))
    return case


def seeds_of(options: LearningOptions, case: Case) -> list[int]:
    """Seeds that were asked for, or the task's: the first ones."""
    return options.seeds or list(range(case.seeds))


def setting_of(options: CaseOptions) -> dict[str, Any]:
    """What tells the rows of this case from others."""
    return {name: getattr(options, name) for name in SETTING} | {"base": options.base and Path(options.base).name}


def cannot_run(text: str, options: LearningOptions) -> str:
    """Why a candidate is left out of a case; nothing where it is not."""
    name = text.partition(":")[0]
    if options.bits == "nf4" and (name == "full" or (name in methods.names() and not methods.describe(name).four_bit)):
        return "does not train a 4-bit base."
    return ""


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the sweeps; returns their rows."""
    options = harness.parse(LearningOptions, __doc__, argv)
    case = fill_in_sizes(options)
    task = TASKS[options.task](options)
    numbers, seeds = budget(task, options.rank, options.steps), seeds_of(options, case)
    path = (options.output or Path("runs/learning")) / "learning.jsonl"
    setting = setting_of(options) | {"weights": weights_of(task.base)}
    lines = JsonLines(path, setting, harness.machine(options.device), options.again)
    found = []
    first, every = options.part
    for name in (options.candidates or list(CANDIDATES))[first::every]:
        candidate = find(name)
        if options.plan:
            _, model = adapted(candidate.text, task, numbers, seeds[0])
            print(f"{name:24} {trained_numbers(model, task):>12,}  {candidate.text}")
            continue

        def measure(rate: float, seed: int, name: str = name, text: str = candidate.text) -> dict[str, Any]:
            work = partial(run, text, task, options, numbers, rate, seed)
            return lines.measure(work, candidate=name, method=text, learning_rate=rate, seed=seed)

        if refused := cannot_run(candidate.text, options):
            print(f"{name}: {refused}", flush=True)
        elif options.rates:
            found += [measure(rate, seed) for seed in seeds for rate in options.rates]
        else:
            found += sweep(measure, candidate.rate * case.rate, seeds)
    return found


if __name__ == "__main__":
    main()
