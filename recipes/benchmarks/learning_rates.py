"""Best learning rates of `learning.py`'s rows against the law of `training.values_rate`.

    python recipes/benchmarks/learning_rates.py --rows runs/learning/learning.jsonl --task words --rank 4
    python recipes/benchmarks/learning_rates.py --rows runs/learning/learning.jsonl --task words --rank 4 --first_step

A table of one case: for each candidate of sparse values alone, its best rate over LoRA's (both at the lowest point of
a parabola through the test losses, `Sweep.smooth_rate`), the ratio of `values_ratio="auto"` (median over the weights),
and the factor between them. A factor within 2 is within one step of the sweep. `--first_step` adds the ratio at which
the first step really moves outputs as far as LoRA's does (`learning_movement`; geometric mean over the layers).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Column, option
from learning import CaseOptions, fill_in_sizes, setting_of
from learning_candidates import find
from learning_hub_tasks import TASKS
from learning_movement import first_step
from learning_rows import JsonLines, Sweep, cases, weights_of
from learning_runs import adapted, budget

from hf_sparse_peft.training import AgedAdamWSpec

FAMILIES = ("entries", "structured")


@dataclass
class RateOptions(CaseOptions):
    """Options: those of the case, and the rows."""

    rows: list[Path] = option([], "files of rows; by default runs/learning/learning.jsonl")
    first_step: bool = option(False, "measure the movement of the first step too; minutes")


def predicted(text: str, task: Any, numbers: dict[str, float]) -> float:
    """Median over the weights of the ratio that "auto" gives."""
    _, model = adapted(text, task, numbers, seed=0)
    return statistics.median(AgedAdamWSpec(values_ratio="auto").ratios(model).values())


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print the table of a case; returns its lines."""
    options = harness.parse(RateOptions, __doc__, argv)
    fill_in_sizes(options)
    task = TASKS[options.task](options)
    numbers = budget(task, options.rank, options.steps)
    files = options.rows or [Path("runs/learning/learning.jsonl")]
    found = cases(row for file in files for row in JsonLines(file, {}, {}).read())
    sweeps: dict[str, Sweep] = found.get((*setting_of(options).values(), weights_of(task.base)), {})
    if "lora" not in sweeps:
        raise SystemExit(f"no rows of LoRA in this case; the files have {', '.join(map(str, found))}.")
    lora, lines = sweeps["lora"].smooth_rate, []
    moved = partial(first_step, task=task, options=options, numbers=numbers)
    by_lora = moved(find("lora").text) if options.first_step else {}
    for name, sweep in sweeps.items():
        if find(name).family in FAMILIES:
            law = predicted(find(name).text, task, numbers)
            ratio = sweep.smooth_rate / lora
            lines.append({"candidate": name, "rate": sweep.smooth_rate, "ratio": ratio, "law": law})
            if options.first_step:
                ratios = [by_lora[layer] / far for layer, far in moved(find(name).text).items() if far > 0]
                lines[-1]["first step"] = statistics.geometric_mean(ratios)
    columns = [
        Column("candidate", "candidate"),
        Column("best rate", "rate", "{:.2g}"),
        Column("over LoRA's", "ratio", "{:.2f}"),
        Column("law", "law", "{:.2f}"),
        Column("measured / law", lambda line: line["ratio"] / line["law"], "{:.2f}"),
    ]
    if options.first_step:
        columns.append(Column("first step", "first step", "{:.2f}"))
    print(harness.markdown(columns, lines))
    errors = [abs(math.log2(line["ratio"] / line["law"])) for line in lines]
    print(f"LoRA's best rate: {lora:.2g}. Within a factor of 2: {sum(e <= 1 for e in errors)} of {len(errors)}.")
    return lines


if __name__ == "__main__":
    main()
