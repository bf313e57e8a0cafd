"""What one training step costs in time and memory, candidate beside candidate, in one process.

    python recipes/benchmarks/step_cost.py                                          # CPU: bf16 and fp32
    python recipes/benchmarks/step_cost.py --bases nf4                              # CPU, 4-bit base
    python recipes/benchmarks/step_cost.py --device cuda --preset llama-3b --bases bf16 nf4
    python recipes/benchmarks/step_cost.py --check                                  # exit 1 where a bar is missed
    python recipes/benchmarks/step_cost.py --candidates lora entry adalora:r=16     # any method, see harness.py

Candidates take turns: a round runs one step of each, starting at another one each time, and every ratio is a median
over rounds of times measured seconds apart. So a machine that slows down for a minute moves no ratio. Run it on a quiet
machine all the same; where others compute too, `--clock cpu --threads 1` counts this process's CPU time instead. A base
that was measured with this setting, machine and source is not measured again. Two checkouts in one sitting:

    PYTHONPATH=BEFORE python BEFORE/recipes/benchmarks/step_cost.py --output runs/before
    PYTHONPATH=AFTER python AFTER/recipes/benchmarks/step_cost.py --against runs/before/step_cost.json --check

A table goes to the terminal, `step_cost.json` and `step_cost.png` to `--output`.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from harness import Column, LivingUnits, Rows, draw, option, parse, print_table
from llama import LlamaOptions, adapt, build_base, targets
from step_cost_bars import check, compare
from trial import Trial, file_bytes, first_step, host_waits, optimizer_bytes, peak_bytes

RANK = 16
PEERS = {
    "frozen": "frozen",
    "lora": "lora:r=$rank,lora_alpha=$alpha",
    "lora_lean": "lora:r=$rank,lora_alpha=$alpha",
    "shira": "peft-shira:r=$rank,random_seed=0",
    "supertuning": "peft-supertuning:sparsity=$sparsity",
    "full": "full",
    "spiel": "spiel",
}
OURS = {
    "entry": "shira:budget={type: rank_equivalent, rank: $rank}",
    "entry_grid": "shira:density=$density,pattern={type: grid, rows: 0.25, columns: 0.25}",
    "block32": "shira:budget={type: rank_equivalent, rank: $rank},granularity=block,block_size=32",
    "row": "shira:budget={type: rank_equivalent, rank: $rank},granularity=row",
    "column": "shira:budget={type: rank_equivalent, rank: $rank},granularity=column",
    "subnet": "shira:budget={type: rank_equivalent, rank: $rank},granularity=subnet",
    "diagonal": "diablo:blocks=$blocks",
    "hybrid": "shira:budget={type: rank_equivalent, rank: $half},r=$half,lora_alpha=$rank",
}
MOVED = tuple(name for name in OURS if name not in ("subnet", "diagonal"))
"""Of ours, those whose units `MOVING` moves."""
CANDIDATES = PEERS | OURS
MOVING = "spiel-ag:every=3,steps=2,"
"""Prefix of the method whose moves are timed: a plain step, two that collect, the second of which ends in a move."""
INTERVAL, COLLECT_STEPS = 20, 5
"""SpIEL's defaults, for which the shares are computed: 5 of 20 steps collect, and then a fifth of the support moves."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SERIES = ("step time", "saved bytes")
STATE = "gradient_optimizer_bytes"


@dataclass
class StepCostOptions(LlamaOptions):
    """Options of this benchmark."""

    bases: list[str] = option(["bf16", "fp32"], "of bf16, fp32 and nf4")
    candidates: list[str] = option(list(CANDIDATES), f"of {', '.join(CANDIDATES)}, or methods")
    rounds: int = option(9, "rounds of one step of each candidate")
    warmup: int = option(2, "rounds that are not counted")
    clock: Literal["wall", "cpu"] = option("wall", "cpu: time of this process alone")
    compiled: bool = option(False, "compile the models")
    backend: str = option("inductor", "of torch.compile")
    check: bool = option(False, "exit with 1 when a bar is missed")
    against: Path | None = option(None, "step_cost.json of another checkout, to be no slower or larger than")


def main(argv: list[str] | None = None) -> int:
    """Measure, report, and return the exit status."""
    options = parse(StepCostOptions, __doc__, argv)
    earlier = json.loads(options.against.read_text())["rows"] if options.against else None
    rows = Rows(options, "step_cost", setting_of(options), timed=True)
    names, bars, panels = options.candidates, [], {}
    for base in options.bases:
        row = rows.measure(partial(measure_base, options, base), base=base, candidates=names)
        bars += check(base, options.device, row["figures"])
        if earlier is not None:
            bars += compare(base, row, earlier)
        print_figures(base, row["figures"], row["skipped"])
        if "lora" in row["figures"]:
            over = {name: found["over"]["lora"] for name, found in row["figures"].items()}
            panels[f"{base} base"] = {name: [[found[key]] for key in SERIES] for name, found in over.items()}
    rows.save(bars=bars)
    if panels:
        sizes = f"{options.sizes().layers} x {options.sizes().hidden}, {options.sizes().tokens} tokens"
        title = f"Cost of a training step, LoRA r={RANK} = 1\nLlama of {sizes}, {rows.machine['device']}"
        draw(rows.folder / "step_cost.png", title, panels, SERIES, "LoRA with its defaults", cut=3.0)
    print(f"\nWritten: {rows.path} and its picture")
    missed = [bar for bar in bars if not bar["met"]]
    for bar in missed:
        print(f"MISSED {bar['name']}: got {bar['got']:.3f}, wanted <= {bar['wanted']:.2f}")
    print(f"{len(bars) - len(missed)} of {len(bars)} bars met.")
    return 1 if options.check and missed else 0


def setting_of(options: StepCostOptions) -> dict[str, Any]:
    """What figures depend on beside the machine, base and candidates."""
    setting = {name: getattr(options, name) for name in ("preset", "clock", "rounds", "warmup")}
    compiled = {"compiled": options.backend} if options.compiled else {}
    return {**setting, **compiled, "rank": RANK, "model": asdict(options.sizes())}


def print_figures(title: str, figures: dict[str, Any], skipped: dict[str, str]) -> None:
    """Both tables of the candidates that were measured, and why others were not."""
    measured = [{"candidate": name, **row} for name, row in figures.items()]
    print_table(f"{title}: time of a step", TIMES, measured)
    print_table(f"{title}: MiB (files: KiB)", BYTES, measured)
    for name, reason in skipped.items():
        print(f"  {name}: left out. {reason}")


def measure_base(
    options: StepCostOptions, base_name: str, in_time: Callable[[], bool] = lambda: True
) -> dict[str, dict[str, Any]]:
    """`figures` of each candidate over one base, and why others were `skipped`.

    Once `in_time` says no, no candidate is begun, and rounds end with the third.
    """
    preset = options.sizes()
    base = build_base(preset, base_name, options.device)
    torch.manual_seed(1)
    input_ids = torch.randint(preset.vocab, (preset.batch, preset.tokens), device=options.device)
    shapes = set(targets(base).values())
    if any(preset.tokens * preset.batch in shape for shape in shapes):
        shapes = set()  # activations have the shape of weights here, and nothing can be told apart

    def trial_of(name: str, candidate: str) -> Trial:
        model, method = adapt(base, candidate, RANK, lean=name == "lora_lean")
        if options.compiled:
            model.compile(backend=options.backend)
        return Trial(model, input_ids, method, CLOCKS[options.clock])

    trials, figures, skipped = {}, {}, {}
    for name in options.candidates:
        if not in_time():
            skipped[name] = "No time was left."
            continue
        try:
            trial = trial_of(name, CANDIDATES.get(name, name))
            figures[name] = first_step(trial, shapes)
            figures[name]["peak_bytes"] = peak_bytes(trial.model, trial.optimizer, trial.step, options.device)
            figures[name]["waits"] = host_waits(trial.step_without_end, options.device)
            trials[name] = trial
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            figures.pop(name, None)
            trial = None
            _free()
    times = _time_rounds(trials, options.rounds, options.warmup, in_time)
    for name in [name for name in MOVED if name in trials and in_time()]:
        figures[name] |= _moves(trial_of(name, MOVING + OURS[name].removeprefix("shira:")), max(3, options.rounds // 2))
    for name, trial in trials.items():
        figures[name] |= {"seconds": statistics.median(times[name]), "seconds_by_round": times[name]}
        figures[name] |= file_bytes(trial.model)
    for name, row in figures.items():
        paired = {other: {"step time": _paired(times[name], times[other])} for other in trials}
        row["over"] = {other: paired[other] | _bytes_over(row, figures[other]) for other in trials}
    trials.clear()
    _free()
    return {"figures": figures, "skipped": skipped}


def _time_rounds(
    trials: dict[str, Trial], rounds: int, warmup: int, in_time: Callable[[], bool]
) -> dict[str, list[float]]:
    order, times = list(trials), {name: [] for name in trials}
    for number in range(warmup + rounds if order else 0):
        if number >= warmup + 3 and not in_time():
            break
        start = number % len(order)
        for name in order[start:] + order[:start]:
            times[name].append(trials[name].seconds())
    return {name: measured[warmup:] for name, measured in times.items()}


def _paired(times: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def _bytes_over(row: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Bytes over those of another candidate. All but saved and peak bytes are for one trained number: whole blocks and
    rows cannot match its count exactly."""
    ratios = {key: row[key.replace(" ", "_")] / other[key.replace(" ", "_")] for key in ("saved bytes", "peak bytes")}
    with_index = row[STATE] + row["index_bytes"]
    with_ages = with_index + row.get("age_bytes", 0)
    kept = {"state": row[STATE], "state + index": with_index, "state + index + ages": with_ages}
    files = {"file": row.get("file_bytes"), "file, bf16": row.get("file_bytes_bf16")}
    if row["trained_numbers"] and other["trained_numbers"]:
        scale = other["trained_numbers"] / row["trained_numbers"]
        ratios |= {key: scale * value / other[STATE] for key, value in kept.items()}
        ratios |= {
            key: scale * value / other["file_bytes"] for key, value in files.items() if value and "file_bytes" in other
        }
    return ratios


def _moves(trial: Trial, rounds: int) -> dict[str, float]:
    """Times of collecting steps and of the move that ends a phase, against plain steps beside them, and what the
    callbacks take of a plain step."""
    units = LivingUnits(trial.model)
    trial.step()
    trial.step()  # the first move replaces the random start whole
    if not units.moved():
        raise RuntimeError("the support did not move: nothing to time")
    plain, opening, adding, moving, callbacks = [], [], [], [], []
    for _ in range(rounds):
        trial.callback_seconds = 0.0
        plain.append(trial.seconds())
        callbacks.append(trial.callback_seconds)
        opening.append(trial.seconds())
        adding.append(trial.seconds(trial.step_without_end))
        moving.append(trial.seconds(trial.end))
    phase = [(a + (COLLECT_STEPS - 1) * b) / COLLECT_STEPS for a, b in zip(opening, adding, strict=True)]
    return {
        "age_bytes": optimizer_bytes(trial.optimizer) - 2 * sum(p.nbytes for p in trial.trained),
        "callback_share": _paired(callbacks, plain),
        "move_seconds": statistics.median(moving),
        "move_share": _paired(moving, [(INTERVAL - COLLECT_STEPS) * seconds for seconds in plain]),
        "collect_over_plain": _paired(phase, plain),
    }


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _over(key: str, digits: int) -> list[Column]:
    titles = {"frozen": "/ floor", "lora": "/ LoRA", "lora_lean": "/ lean"}
    return [
        Column(title, lambda row, other=other: row["over"].get(other, {}).get(key), f"{{:.{digits}f}}")
        for other, title in titles.items()
    ]


def _scaled(title: str, form: str, factor: float, *keys: str) -> Column:
    """Sum of the figures that a row has, times `factor`; nothing where the first is missing."""
    return Column(title, lambda row: factor * sum(row.get(k, 0) for k in keys) if keys[0] in row else None, form)


TIMES = (
    Column("candidate", "candidate"), Column("trained", "trained_numbers", "{:,}"),
    _scaled("ms", "{:.0f}", 1e3, "seconds"), *_over("step time", 2),
    _scaled("move ms", "{:.1f}", 1e3, "move_seconds"), _scaled("share", "{:.1f} %", 100, "move_share"),
    _scaled("callbacks", "{:.2f} %", 100, "callback_share"), Column("collecting", "collect_over_plain", "{:.2f}"),
)  # fmt: skip
BYTES = (
    Column("candidate", "candidate"), _scaled("saved", "{:,.1f}", 2**-20, "saved_bytes"), *_over("saved bytes", 3),
    _scaled("grad + opt", "{:,.1f}", 2**-20, STATE), _scaled("+ index", "{:,.1f}", 2**-20, STATE, "index_bytes"),
    _scaled("+ ages", "{:,.1f}", 2**-20, STATE, "index_bytes", "age_bytes"),
    _scaled("peak", "{:,.1f}", 2**-20, "peak_bytes"), _scaled("file", "{:,.0f}", 2**-10, "file_bytes"),
    _scaled("bf16", "{:,.0f}", 2**-10, "file_bytes_bf16"),
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
