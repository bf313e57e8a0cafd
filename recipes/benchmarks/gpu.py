"""All that a GPU can tell, in one process and under nine minutes.

    python recipes/benchmarks/gpu.py                        # on the GPU; --seconds 300 for less
    python recipes/benchmarks/gpu.py --write                # and put its costs into hf_sparse_peft/ops/costs.json
    python recipes/benchmarks/gpu.py --parts gradients      # of kernels, gradients, crossovers, steps, moves
    python recipes/benchmarks/gpu.py --dry-run              # every line on tiny shapes on a CPU, Triton interpreted

What matters most comes first, and every row is written to `gpu.json` in `--output` as it ends: a run that was broken
off, or was out of time, goes on where it was, on this machine and with this source. Each part has a share of the time,
what a part leaves goes to the next, and what was left out is said.

kernels     gradients, outputs, input gradients at supports against float64: all dtypes, odd shapes, none to all units
gradients   what each way to a gradient at a support costs: projections of Llama 3B, 8B and 1B, 1k to 8k tokens
crossovers  up to which density each way beats the dense gradient (from `gradients`), and the costs by which the package
            chooses its ways; --write puts them into its table
steps       `step_cost.py` at the shapes of a 3B: two depths, and from both the cost of all 28 layers
moves       a run whose support moves, under Trainer, and the same run resumed from its middle
"""

from __future__ import annotations

import os
import sys

if "--dry-run" in sys.argv or "--dry_run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import engine_costs
import torch
from engine_costs import print_costs
from harness import Column, Options, Rows, draw, markdown, option, parse, print_table
from kernel_cost import (
    BLOCKS,
    DTYPES,
    SHAPES,
    UNITS,
    Unit,
    check_unit,
    crossovers,
    kernels_run,
    measure_projection,
)
from llama import PRESETS
from moves import run_with_moves
from step_cost import CANDIDATES, StepCostOptions, measure_base, print_figures, setting_of
from step_cost_bars import check, expected

from hf_sparse_peft.ops.costs import Costs

PARTS = {"kernels": 0.15, "gradients": 0.22, "crossovers": 0.05, "steps": 0.45, "moves": 0.13}
"""Parts in their order, and the share of the time that each has."""
NO_GPU = "no GPU was available"
COMPILED = ("frozen", "lora", "lora_lean", "entry", "entry_grid", "block32", "row", "column", "subnet")
LATE = ("full", "spiel", "supertuning", "shira")
"""Peers that are built last: they draw or sort all entries of a weight on the CPU, or hold the most memory."""
Figures = dict[str, Any]


@dataclass
class GpuOptions(Options):
    """Options of this benchmark."""

    seconds: float = option(520.0, "time that all parts have together")
    parts: list[str] = option(list(PARTS), f"of {', '.join(PARTS)}")
    rounds: int = option(7, "timings of each way, and rounds of training steps")
    write: bool = option(False, "put the measured costs into the package's table")
    dry_run: bool = option(False, "tiny shapes on the CPU: shows that every line runs, measures nothing")


@dataclass(frozen=True)
class Sizes:
    """How much of everything is measured."""

    dtypes: tuple[str, ...]
    units: dict[Unit, tuple[float, ...]]
    checked: tuple[Unit, ...]
    large: tuple[bool, ...]
    shapes: dict[str, dict[str, tuple[int, int]]]
    tokens: tuple[int, ...]
    step: StepCostOptions
    runs: tuple[tuple[str, bool, int], ...]
    """Base, compiled, layers: two depths of each."""
    compiled: tuple[str, ...]
    moving: tuple[tuple[str, str], ...]


CHECKED = (
    Unit("entry"), Unit("entry", share=0.25), *(Unit("block", size) for size in BLOCKS),
    Unit("row"), Unit("column"), Unit("subnet"),
)  # fmt: skip


def real_sizes(options: GpuOptions) -> Sizes:
    """What a GPU is given."""
    step = StepCostOptions(device=options.device, preset="llama-3b", rounds=options.rounds)
    step.candidates = [name for name in CANDIDATES if name not in LATE] + list(LATE)
    moving = (("bf16", "entry"), ("bf16", "block32"), ("nf4", "row"), ("nf4", "hybrid"))
    runs = tuple((base, compiled, depth) for compiled in (False, True) for base in ("bf16", "nf4") for depth in (6, 2))
    return Sizes(tuple(DTYPES), UNITS, CHECKED, (False, True), SHAPES, (4096, 1024, 8192), step, runs, COMPILED, moving)


def tiny_sizes(options: GpuOptions) -> Sizes:
    """The same lines in seconds on a CPU."""
    few = ["frozen", "lora", "full", "entry"]
    step = StepCostOptions(device="cpu", hidden=64, tokens=16, rounds=3, warmup=1, candidates=few, backend="aot_eager")
    units = {Unit("entry"): (0.01, 0.05), Unit("entry", share=0.25): (0.02,), Unit("block", 16): (0.1,)}
    checked = (Unit("entry"), Unit("entry", share=0.25), Unit("block", 16), Unit("row"), Unit("column"), Unit("subnet"))
    shapes = {"tiny": {"q, o": (64, 64), "down": (32, 96)}}
    moving = (("bf16", "entry"), ("nf4", "row"))
    runs = (("bf16", False, 2), ("bf16", False, 1), ("nf4", False, 1), ("bf16", True, 1))
    return Sizes(("bf16",), units, checked, (False,), shapes, (48,), step, runs, ("entry",), moving)


class Clock:
    """The time that each part has."""

    def __init__(self, seconds: float, parts: list[str]):
        self._start, self._ends, share = time.monotonic(), {}, 0.0
        for part in parts:
            share += PARTS[part]
            self._ends[part] = self._start + seconds * share / sum(PARTS[name] for name in parts)
        self.left_out: list[str] = []

    def in_time(self, part: str) -> bool:
        """Whether there is time for more of a part."""
        return time.monotonic() < self._ends[part]

    def allows(self, part: str, what: str) -> bool:
        """`in_time`, and where not `what` is noted as left out."""
        if not self.in_time(part):
            self.left_out.append(f"{part}: {what}")
        return self.in_time(part)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start


def main(argv: list[str] | None = None) -> int:
    """Measure, report, and return the exit status: 1 where something was wrong."""
    options = parse(GpuOptions, __doc__, argv)
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise SystemExit(f"--parts {' '.join(unknown)}: unknown; choose of {', '.join(PARTS)}.")
    if not options.dry_run and options.device == "cpu":
        print(f"{NO_GPU}. Run this on a machine with a GPU, or with --dry-run. What is expected there:")
        print_table(EXPECTED, EXPECTED_COLUMNS, beside_expected({}))
        return 2
    if options.dry_run:
        options.device, options.rounds = "cpu", min(2, options.rounds)
    sizes = tiny_sizes(options) if options.dry_run else real_sizes(options)
    rows = Rows(options, "gpu", {"dry_run": options.dry_run, "rounds": options.rounds}, timed=True)
    clock = Clock(options.seconds, options.parts)
    wrong: list[str] = []
    for part in (part for part in PARTS if part in options.parts):
        begun = clock.seconds
        wrong += RUN[part](sizes, rows, clock)
        print(f"-- {part}: {clock.seconds - begun:.0f} s, {clock.seconds:.0f} s in all\n", flush=True)
    figures = whole_models(rows, sizes)
    report(rows, figures)
    if options.write and not options.dry_run:
        try:
            engine_costs.write(costs_by_dtype(rows.of("costs")), options.device)
        except ValueError as error:  # noise
            wrong.append(f"costs were not written: {error} Run again with --parts crossovers --again --write.")
    for title, lines in (("Left out, for want of time", clock.left_out), ("WRONG", wrong)):
        for line in lines:
            print(f"{title}: {line}")
    print(f"Written: {rows.folder}")
    return 1 if wrong else 0


def kernels(sizes: Sizes, rows: Rows, clock: Clock) -> list[str]:
    """Results at supports against float64."""
    device = torch.device(sizes.step.device)
    if not kernels_run(device):
        print("No Triton kernel runs here (not installed, or cannot start): torch's paths alone are checked.")
    found = []
    for large in sizes.large:
        for unit in sizes.checked:
            for dtype in sizes.dtypes:
                key = {"part": "kernels", "unit": str(unit), "dtype": dtype, "large": large}
                if clock.allows("kernels", f"{unit}, {dtype}{', large' if large else ''}"):
                    work = partial(check_unit, unit, dtype, device, large)
                    found.append(rows.measure(work, go_on=True, **key))
    print_table("largest errors against float64, over the largest number", ERROR_COLUMNS, found)
    return [
        f"{row['unit']} in {row['dtype']}: {row.get('wrong') or row.get('error')}"
        for row in found
        if not row.get("right")
    ]


def gradients(sizes: Sizes, rows: Rows, clock: Clock) -> list[str]:
    """The table of ways to gradients at supports."""
    found, device = [], torch.device(sizes.step.device)
    plan = [(t, model, layer) for t in sizes.tokens for model, layers in sizes.shapes.items() for layer in layers]
    for tokens, model, layer in plan:
        shape = sizes.shapes[model][layer]
        if clock.allows("gradients", f"{model} {layer}, {tokens} tokens"):
            measured = (
                shape,
                tokens,
                "bf16",
                sizes.units,
                rows.setting["rounds"],
                device,
                lambda: clock.in_time("gradients"),
            )
            place = {"part": "gradients", "model": model, "layer": layer, "tokens": tokens, "dtype": "bf16"}
            work = partial(_projection, *measured)
            found.append(rows.measure(work, go_on=True, **place, rows=shape[0], cols=shape[1]))
    points = [{**row, **point} for row in found for point in row.get("points", {}).values()]
    print_table("gradient at the support, bf16", GRADIENT_COLUMNS, points)
    return _errors(found)


def _projection(*measured: Any) -> Figures:
    return {"points": measure_projection(*measured)}


def find_crossovers(sizes: Sizes, rows: Rows, clock: Clock) -> list[str]:
    """Where the ways cross, from the rows of `gradients`, and the costs that the package's table takes."""
    measured = [row for row in rows.of("gradients") if row.get("points")]
    if measured:
        table = crossovers(measured)
        print_table("up to which density a way beats the dense gradient", CROSSOVER_COLUMNS, table)
        rows.save(crossovers=table)
    else:
        clock.left_out.append("crossovers: no row of `gradients` is there")
    found, device = [], torch.device(sizes.step.device)
    for dtype in sizes.dtypes:
        if clock.allows("crossovers", f"costs in {dtype}"):
            work = partial(_costs, dtype, rows.setting["rounds"], device, 64 if rows.setting["dry_run"] else None)
            found.append(rows.measure(work, go_on=True, part="costs", dtype=dtype))
    print_costs(costs_by_dtype(found))
    return _errors(found)


def _costs(dtype: str, *how: Any) -> Figures:
    return {"costs": asdict(engine_costs.measure(DTYPES[dtype], *how))}


def costs_by_dtype(rows: list[Figures]) -> dict[torch.dtype, Costs]:
    """Rows of the package's table from rows of `costs`."""
    return {DTYPES[row["dtype"]]: Costs(**row["costs"]) for row in rows if "costs" in row}


def steps(sizes: Sizes, rows: Rows, clock: Clock) -> list[str]:
    """Training steps, through step_cost."""
    found = []
    for base, compiled, depth in sizes.runs:
        options = replace(sizes.step, layers=depth, compiled=compiled)
        if compiled:
            options.candidates = [name for name in sizes.compiled if name in CANDIDATES]
        key = {"part": "steps", "base": base, "compiled": compiled, "layers": depth, "step": setting_of(options)}
        title = f"{base}, {depth} layers{', compiled' if compiled else ''}"
        if clock.allows("steps", title):
            row = rows.measure(partial(measure_base, options, base, lambda: clock.in_time("steps")), go_on=True, **key)
            print_figures(title, row.get("figures", {}), row.get("skipped", {}))
            found.append(row)
    return _errors(found)


def moves(sizes: Sizes, rows: Rows, clock: Clock) -> list[str]:
    """Runs with moves, resumed in the middle."""
    found = []
    for base, name in sizes.moving:
        if clock.allows("moves", f"{name} on {base}"):
            work = partial(run_with_moves, sizes.step.device, base, CANDIDATES[name], rows.setting["dry_run"])
            found.append(rows.measure(work, go_on=True, part="moves", base=base, candidate=name))
    print_table("moves under Trainer: the run resumed from its middle against the whole one", MOVE_COLUMNS, found)
    return _errors(found) + [
        f"moves of {row['candidate']} on {row['base']}: {row['wrong']}" for row in found if row.get("wrong")
    ]


def _errors(found: list[Figures]) -> list[str]:
    return [f"{row['part']}: {row['error']}" for row in found if "error" in row]


RUN: dict[str, Callable[[Sizes, Rows, Clock], list[str]]] = {
    "kernels": kernels, "gradients": gradients, "crossovers": find_crossovers, "steps": steps, "moves": moves,
}  # fmt: skip


# Report


def whole_models(rows: Rows, sizes: Sizes) -> dict[str, Figures]:
    """By base (`bf16`, `bf16, compiled`): time and memory of each candidate at all layers of the preset, on the line
    through both depths: layers are alike, embeddings and head are there once."""
    found, layers = {}, PRESETS[sizes.step.preset].layers
    for base, compiled in dict.fromkeys(run[:2] for run in sizes.runs):
        depths = [depth for *run, depth in sizes.runs if run == [base, compiled]]
        rows_of = [rows.of("steps", base=base, compiled=compiled, layers=depth) for depth in depths]
        pair = [row["figures"] for found_rows in rows_of for row in found_rows if "figures" in row]
        if len(pair) == 2:
            deep, shallow = depths
            found[base + ", compiled" * compiled] = _extrapolated(*pair, (layers - shallow) / (deep - shallow))
    return found


def _extrapolated(deep: Figures, shallow: Figures, steps: float) -> Figures:
    figures: dict[str, Figures] = {}
    for name in (name for name in deep if name in shallow):
        ends = {key: (shallow[name][key], deep[name][key]) for key in ("seconds", "peak_bytes")}
        figures[name] = {key: low + steps * (high - low) for key, (low, high) in ends.items()}
    for row in figures.values():
        row["over"] = {
            other: {"step time": row["seconds"] / of["seconds"], "peak bytes": row["peak_bytes"] / of["peak_bytes"]}
            for other, of in figures.items()
        }
    return figures


def beside_expected(figures: dict[str, Figures]) -> list[Figures]:
    """What is expected of a GPU, with what was `got`, if anything was measured."""
    measured = [result for base in figures for result in check(base.partition(",")[0], "cuda", figures[base])]
    got = {result["name"]: result["got"] for result in reversed(measured)}  # eager rows come first, and stay
    return [{**row, "got": got.get(row["name"])} for row in expected()]


def report(rows: Rows, figures: dict[str, Figures]) -> None:
    """Tables of whole models, `gpu.md`, and a picture."""
    panels = {}
    for base, found in figures.items():
        lines = [{"candidate": name, **row} for name, row in found.items()]
        print_table(f"{base}: all layers, extrapolated from two depths", WHOLE_COLUMNS, lines)
        over = {name: row["over"].get("lora", {}) for name, row in found.items()}
        panels[base] = {name: [[ratio[key]] for key in SERIES] for name, ratio in over.items() if ratio}
    targets = beside_expected({} if rows.setting["dry_run"] else figures)
    print_table(EXPECTED, EXPECTED_COLUMNS, targets)
    (rows.folder / "gpu.md").write_text(markdown(EXPECTED_COLUMNS, targets))
    if panels := {base: bars for base, bars in panels.items() if bars}:
        title = f"A training step at all layers, extrapolated from two depths\n{rows.machine['device']}"
        draw(rows.folder / "gpu.png", title, panels, SERIES, "LoRA", cut=3.0)


EXPECTED = "Expected on an H100, and measured"
SERIES = ("step time", "peak bytes")


def _of(group: str, name: str, form: str, title: str | None = None) -> Column:
    return Column(title or name, lambda row: row.get(group, {}).get(name), form)


def _over(other: str, key: str, title: str) -> Column:
    return Column(title, lambda row: row["over"].get(other, {}).get(key), "{:.2f}")


ERROR_COLUMNS = (
    Column("unit", "unit"), Column("dtype", "dtype"), Column("large", "large"), Column("cases", "cases"),
    *(_of("errors", name, "{:.0e}") for name in ("kernel", "gradient", "layer's gradient", "output", "input gradient")),
    Column("right", "right"),
)  # fmt: skip
GRADIENT_COLUMNS = (
    Column("model", "model"), Column("layer", "layer"), Column("tokens", "tokens"), Column("unit", "unit"),
    Column("density", "density", "{:.1%}"),
    *(_of("ms", name, "{:.3f}", f"{name} ms") for name in ("dense", "ours", "torch", "sampled", "compacted", "kernel")),
    Column("ours / best", lambda row: row["ms"]["ours"] / min(row["ms"].values()), "{:.2f}"),
    _of("mib", "ours", "{:.0f}", "ours MiB"),
)  # fmt: skip
CROSSOVER_COLUMNS = (
    Column("model", "model"), Column("layer", "layer"), Column("tokens", "tokens"), Column("unit", "unit"),
    Column("way", "way"), Column("density", lambda row: f"{row['side']} {row['density']:.2%}"),
)  # fmt: skip
MOVE_COLUMNS = (
    Column("base", "base"), Column("candidate", "candidate"), Column("moves", "moves"),
    Column("after the checkpoint", "late_moves"), Column("supports equal", "supports_equal"),
    Column("bit-equal", "bit_equal"), Column("largest difference", "difference", "{:.0e}"),
    Column("ms a step", "milliseconds", "{:.1f}"),
)  # fmt: skip
WHOLE_COLUMNS = (
    Column("candidate", "candidate"), Column("ms", lambda row: 1e3 * row["seconds"], "{:.0f}"),
    _over("frozen", "step time", "/ floor"), _over("lora", "step time", "/ LoRA"),
    Column("peak GiB", lambda row: row["peak_bytes"] / 2**30, "{:.2f}"), _over("lora", "peak bytes", "/ LoRA"),
)  # fmt: skip
EXPECTED_COLUMNS = (
    Column("figure", "name"), Column("expected at most", "wanted", "{:.2f}"),
    Column("measured", lambda row: f"not measured: {NO_GPU}" if row["got"] is None else f"{row['got']:.2f}"),
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
