r"""Tables and pictures of `learning.py`'s rows.

    python recipes/benchmarks/learning_report.py
    python recipes/benchmarks/learning_report.py --rows recipes/benchmarks/learning_rows.jsonl \
        --output docs/pictures/learning --text recipes/benchmarks/RESULTS.md

Writes `learning.md` (a table a case, and one for each question that the candidates of a case can answer), and for each
case of four candidates or more `curves_<case>.png` (score over learning rate), `scores_<case>.png` (mean, lowest and
highest of the seeds) and `frontier_<case>.png` (score against what was forgotten) to `--output`; the tables go to the
terminal too.
"""

from __future__ import annotations

import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import matplotlib.pyplot as plt
from harness import Column, option
from learning_candidates import find
from learning_hub_tasks import TASKS
from learning_rows import CASE, JsonLines, Row, Sweep, cases, paired
from matplotlib.ticker import NullFormatter

REFERENCE = "lora"
QUESTIONS = {
    "Does a support chosen by data beat a random one?": (
        "entries-random",
        ("entries-magnitude", "entries-low-rank", "entries-gradient", "entries-fisher", "entries-snip", "entries-grid"),
    ),
    "Do moves help over the same choice made once? (random start)": ("entries-random", ("spiel-ag", "rigl")),
    "Do moves help over the same choice made once? (gradient)": ("entries-gradient", ("entries-gradient-moving",)),
    "Do moves help over the same choice made once? (low-rank magnitude)": (
        "entries-low-rank",
        ("lift", "entries-low-rank-moving"),
    ),
    "The hybrid against its halves": (
        "lora",
        ("sparse-lora", "hybrid", "hybrid-low-share", "entries-magnitude", "sparse-lora-random", "sparse-lora-gradient",
         "sparse-lora-columns", "hybrid-equal-rates", "hybrid-quarter", "hybrid-quarter-alpha", "hybrid-random-double",
         "rosa", "joint-budget", "joint-budget-start"),
    ),
    "Entries against other units (chosen by gradient)": (
        "entries-gradient", ("entries-grid", "blocks", "rows", "columns"),
    ),
    "Entries against other units (random)": (
        "entries-random", ("blocks-random", "rows-random", "columns-random", "subnet", "losia"),
    ),
}  # fmt: skip
"""Question -> the candidate that others are compared with, and these."""


@dataclass
class ReportOptions:
    """Options of the report."""

    output: Path | None = option(None, "folder of the pictures; by default that of the rows")
    rows: list[Path] = option([], "files of rows; by default runs/learning/learning.jsonl")
    text: Path | None = option(None, "file of the tables; by default learning.md in --output")


def signed(pair: tuple[float, float], form: str = ".1f") -> str:
    """Mean difference and its standard error."""
    mean, error = pair
    return f"{mean:+{form}}" if math.isnan(error) else f"{mean:+{form}} ± {error:{form}}"


def spread(sweep: Sweep, key: str = "score", form: str = ".1f") -> str:
    """Mean, lowest and highest of the runs at the best rate; empty where they lack the figure."""
    values = sweep.column(key)
    if not values:
        return ""
    return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def name_of(case: tuple) -> str:
    """A case in a few words, for titles and files."""
    row = dict(zip(CASE, case, strict=True))
    base = "-".join(["", row["base"], row["weights"]]) if row["base"] else ""
    return f"{row['task']}{base}-{row['bits']}-{row['steps']}x{row['batch_size']}-r{row['rank']}"


def form_of(case: tuple) -> str:
    """Digits of a score: losses are small."""
    return ".3f" if case[0] == "e2e" else ".1f"


def best_first(sweeps: dict[str, Sweep]) -> list[Sweep]:
    """By the difference from LoRA over the seeds that both have, since seeds differ; without LoRA by the mean score."""
    lora = sweeps.get(REFERENCE)
    return sorted(
        sweeps.values(),
        key=lambda sweep: -(paired(sweep, lora)[0] if lora else statistics.mean(sweep.column("score"))),
    )


def case_table(case: tuple, sweeps: dict[str, Sweep]) -> str:
    """All candidates of a case, the best first."""
    form, lora = form_of(case), sweeps.get(REFERENCE)
    ordered = best_first(sweeps)

    def at_loras_rate(sweep: Sweep) -> str | None:
        found = sweep.column("score", lora.rate) if lora else []
        return f"{statistics.mean(found):{form}} ({len(found)})" if found else None

    def mean_of(key: str, digits: str) -> Any:
        return lambda sweep: f"{statistics.mean(sweep.column(key)):{digits}}" if sweep.column(key) else None

    columns = [
        Column("candidate", lambda sweep: sweep.name),
        Column("numbers", lambda sweep: f"{sweep.best[0]['trained']:,}"),
        Column("rate", lambda sweep: f"{sweep.rate:g}" + ("" if sweep.inner else " (end)")),
        Column("seeds", lambda sweep: len(sweep.best)),
        Column("score (lowest to highest)", lambda sweep: spread(sweep, form=form)),
        Column("minus LoRA", lambda s: signed(paired(s, lora), form) if lora and s is not lora else None),
        Column("at LoRA's rate (seeds)", at_loras_rate),
        Column("test loss", mean_of("test_loss", ".3f")),
        Column("held-out loss", mean_of("held_out_loss", ".2f")),
        Column("KL", mean_of("kl", ".2f")),
        Column("drift", mean_of("drift", ".4f")),
        Column("first task before", mean_of("first_before", ".1f")),
        Column("first task after", mean_of("first_after", ".1f")),
        Column("second task", mean_of("second", ".1f")),
        Column("slots, %", mean_of("slots", ".1f")),
        Column("s a run", mean_of("seconds", ".0f")),
    ]
    columns = [column for column in columns if any(column.cell(sweep) for sweep in ordered)]
    return harness.markdown(columns, ordered)


def question_tables(case: tuple, sweeps: dict[str, Sweep]) -> str:
    """A table for each question of which the case has the reference and one more."""
    text, form = "", form_of(case)
    for question, (reference, names) in QUESTIONS.items():
        found = [sweeps[name] for name in names if name in sweeps]
        if reference not in sweeps or not found:
            continue
        other = sweeps[reference]
        columns = [
            Column("candidate", lambda sweep: sweep.name),
            Column("score", lambda sweep: spread(sweep, form=form)),
            Column(
                f"minus {reference}", lambda s, other=other: signed(paired(s, other), form) if s is not other else ""
            ),
            Column("test loss", lambda sweep: spread(sweep, "test_loss", ".3f")),
            Column("rate", lambda sweep: f"{sweep.rate:g}"),
        ]
        text += f"\n**{question}**\n\n" + harness.markdown(columns, [other, *found])
    return text


def summary_of_cases(found: dict[tuple, dict[str, Sweep]]) -> str:
    """Every candidate that two cases share: its difference to LoRA in each, in standard errors of that difference, and
    the mean difference of test losses."""
    names = [name for name in dict.fromkeys(n for sweeps in found.values() for n in sweeps) if name != REFERENCE]
    kept = {case: sweeps for case, sweeps in found.items() if REFERENCE in sweeps}
    names = [name for name in names if sum(name in sweeps for sweeps in kept.values()) > 1]
    columns = [Column("candidate", lambda name: name)]
    for case, sweeps in kept.items():
        columns.append(
            Column(
                name_of(case),
                lambda name, case=case, sweeps=sweeps: (
                    signed(paired(sweeps[name], sweeps[REFERENCE]), form_of(case)) if name in sweeps else ""
                ),
            )
        )
    return harness.markdown(columns, names) if names else ""


def draw_curves(path: Path, title: str, sweeps: dict[str, Sweep]) -> None:
    """Score over learning rate, a panel a family, LoRA in every panel."""
    families: dict[str, list[Sweep]] = {}
    for sweep in sweeps.values():
        families.setdefault(find(sweep.name).family, []).append(sweep)
    figure, axes = plt.subplots(
        1, len(families), figsize=(1 + 3.6 * len(families), 5.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (family, members) in zip(axes[0], families.items(), strict=True):
        lora = sweeps.get(REFERENCE)
        if lora and lora not in members:
            _curve(axis, lora, color="0.6", linestyle="--")
        for member in members:
            _curve(axis, member)
        axis.set(title=family, xscale="log", xlabel="learning rate")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    axes[0][0].set_ylabel("score")
    figure.suptitle(f"{title}: score over learning rate (mean of the seeds)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(axis: Any, sweep: Sweep, **style: Any) -> None:
    rates = sorted(sweep.by_rate)
    means = [statistics.mean(sweep.column("score", rate)) for rate in rates]
    axis.plot(rates, means, marker="o", markersize=3, label=sweep.name, **style)


def draw_frontier(path: Path, title: str, sweeps: dict[str, Sweep]) -> None:
    """Score against forgetting at each candidate's best rate; the line joins those that nobody beats in both."""
    keys = {"held_out_loss": "loss on held-out pretraining text", "kl": "KL to the base on the new task, nats a token"}
    keys |= {"drift": "drift of hidden states on other text"}
    keys = {key: label for key, label in keys.items() if any(sweep.column(key) for sweep in sweeps.values())}
    figure, axes = plt.subplots(1, len(keys), figsize=(8.2 * len(keys), 6), squeeze=False, layout="constrained")
    for axis, (key, label) in zip(axes[0], keys.items(), strict=True):
        points = {
            sweep.name: (statistics.mean(sweep.column(key)), statistics.mean(sweep.column("score")))
            for sweep in sweeps.values()
            if sweep.column(key)
        }
        best = frontier(points)
        colors = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(find(n).family for n in points))}
        for name, (x, y) in points.items():
            color = colors[find(name).family]
            axis.scatter([x], [y], s=22, color=color, zorder=3)
            weight = "bold" if name in best else "normal"
            axis.annotate(name, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points", weight=weight)
        axis.step(*zip(*[points[name] for name in best], strict=True), where="post", color="0.6", zorder=1)
        axis.set(xlabel=label, ylabel="score", xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.margins(x=0.12)  # names stand to the right of their points
        axis.grid(alpha=0.3)
        for family, color in colors.items():
            axis.scatter([], [], color=color, label=family)
        axis.legend(fontsize=8)
    figure.suptitle(f"{title}: score against forgetting, each at its best rate")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other has both less forgetting and a higher score than, by forgetting."""
    kept: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not kept or points[name][1] > points[kept[-1]][1]:
            kept.append(name)
    return kept


def head(rows: list[Row]) -> str:
    """Number of runs, hours, machines and versions."""
    hours = sum(row["seconds"] for row in rows) / 3600
    names = ("device", "threads", "torch", "transformers", "peft")
    machines = {", ".join(f"{name} {row['machine'].get(name)}" for name in names) for row in rows}
    stopped = sum("stopped_at" in row for row in rows)
    return (
        f"{len(rows):,} runs, {hours:.1f} hours of one CPU core, {stopped} of them stopped early; "
        f"{'; '.join(sorted(machines))}. Protocol: recipes/benchmarks/learning.py; the rows, each with its command "
        "(`learning_rows.command_of`): recipes/benchmarks/learning_rows.jsonl.\n"
    )


def draw_case(folder: Path, title: str, metric: str, sweeps: dict[str, Sweep]) -> list[Path]:
    """All pictures of a case."""
    pictures = [folder / f"{kind}_{title}.png" for kind in ("curves", "frontier", "scores")]
    draw_curves(pictures[0], title, sweeps)
    draw_frontier(pictures[1], title, sweeps)
    bars = {f"{sweep.name} ({len(sweep.best)})": [sweep.column("score")] for sweep in best_first(sweeps)}
    if any(score < 0 for values in bars.values() for score in values[0]):
        return pictures[:2]  # minus a loss has no bar
    harness.draw(pictures[2], title, {metric: bars}, ["mean, lowest and highest of the seeds (their number)"])
    return pictures


def report(rows: list[Row], folder: Path, path: Path, pictures_of: int = 4) -> str:
    """Write tables to `path` and pictures to a folder; returns the tables. Cases of fewer candidates than `pictures_of`
    have tables only."""
    folder.mkdir(parents=True, exist_ok=True)
    found = cases(rows)
    text = "# Results of learning.py\n\n" + head(rows)
    if shared := summary_of_cases(found):
        text += "\n## Score minus LoRA's, each at its best rate\n\n" + shared
    for case, sweeps in found.items():
        title, metric = name_of(case), TASKS[case[0]].metric
        text += f"\n## {title}\n\nScore: {metric}.\n\n" + case_table(case, sweeps) + question_tables(case, sweeps)
        if len(sweeps) >= pictures_of:
            pictures = [os.path.relpath(one, path.parent) for one in draw_case(folder, title, metric, sweeps)]
            text += "\n" + "\n".join(f"![{Path(one).stem}]({one})" for one in pictures) + "\n"
    path.write_text(text)
    return text


def main(argv: list[str] | None = None) -> str:
    """Read the rows, write tables and pictures; returns the tables."""
    options = harness.parse(ReportOptions, __doc__, argv)
    files = options.rows or [Path("runs/learning/learning.jsonl")]
    rows = [row for file in files for row in JsonLines(file, {}, {}).read()]
    if not rows:
        raise SystemExit(f"no rows in {', '.join(map(str, files))}: run learning.py first, or pass --rows.")
    folder = options.output or files[0].parent
    text = report(rows, folder, options.text or folder / "learning.md")
    print(text)
    return text


if __name__ == "__main__":
    main()
