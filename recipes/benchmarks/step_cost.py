"""What one training step costs in time and memory, method beside method, in one process.

    python recipes/benchmarks/step_cost.py                                          # CPU: bf16 and fp32
    python recipes/benchmarks/step_cost.py --base nf4                               # CPU, 4-bit base
    python recipes/benchmarks/step_cost.py --device cuda --preset llama-3b          # GPU: bf16 and NF4
    python recipes/benchmarks/step_cost.py --check                                  # exit 1 where a bar is missed

Methods take turns: a round runs one step of each, starting at another one each time, and every ratio is a median over
rounds of times measured seconds apart. So a machine that slows down for a minute moves no ratio. Run it on a quiet
machine all the same; where others compute too, `--clock cpu --threads 1` counts this process's CPU time instead.
A table goes to the terminal, `step_cost.json` and `step_cost.png` to `--output`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start on stderr otherwise

import torch
from step_cost_measure import (
    COLLECT_STEPS,
    INTERVAL,
    Collection,
    Trial,
    file_bytes,
    first_step,
    move_supports,
    peak_bytes,
)
from step_cost_methods import METHODS, OURS, PRESETS, RANK, Preset, build, build_base, sized, targets
from step_cost_report import check, draw, print_tables

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main(argv: list[str] | None = None) -> int:
    """Measure, report, and return the exit status."""
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*Sparse invariant checks|.*`is_gradient_checkpointing` is deprecated")
    preset = sized(PRESETS[args.preset], args.layers, args.hidden, args.tokens)
    report = {"settings": _settings(args, preset), "machine": _machine(args.device), "bases": {}}
    for base in args.bases:
        report["bases"][base] = measure_base(args, preset, base)
    report["bars"] = check(report)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "step_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    print_tables(report)
    draw(report, args.output / "step_cost.png")
    print(f"\nWritten: {args.output / 'step_cost.json'}, {args.output / 'step_cost.png'}")
    missed = [bar for bar in report["bars"] if not bar["met"]]
    for bar in missed:
        print(f"MISSED {bar['name']}: got {bar['got']:.3f}, wanted <= {bar['wanted']:.2f}")
    print(f"{len(report['bars']) - len(missed)} of {len(report['bars'])} bars met.")
    return 1 if args.check and missed else 0


def measure_base(args: argparse.Namespace, preset: Preset, base_name: str) -> dict[str, Any]:
    """All figures over one base: `rows` by method, and `skipped` with the reason."""
    base = build_base(preset, base_name, args.device)
    torch.manual_seed(1)
    input_ids = torch.randint(preset.vocab, (preset.batch, preset.tokens), device=args.device)
    shapes = {shape for shape in targets(base).values() if preset.tokens * preset.batch not in shape}
    trials, rows, skipped = {}, {}, {}
    for method in args.methods:
        try:
            trial = Trial(build(method, base), input_ids, CLOCKS[args.clock])
            rows[method] = first_step(trial, shapes) | {"peak_bytes": peak_bytes(trial)}
            if not shapes:  # activations have the shape of weights here, and nothing can be told apart
                rows[method]["saved_tensors_of_weight_shape"] = None
        except (NotImplementedError, torch.OutOfMemoryError) as error:
            skipped[method] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            rows.pop(method, None)
            trial = None
            _free(args.device)
            continue
        trials[method] = trial
        _note(f"{base_name}: {method} ready")
    times = _time_rounds(trials, args.rounds, args.warmup)
    for method, row in rows.items():
        row["seconds"] = statistics.median(times[method])
        row["seconds_by_round"] = times[method]
        row["time_over"] = {other: _paired(times[method], times[other]) for other in times if other != method}
    for method in [m for m in trials if m in OURS]:
        rows[method] |= _moves(trials[method], max(3, args.rounds // 2))
        _note(f"{base_name}: {method} moved")
    for method, trial in trials.items():
        rows[method] |= file_bytes(trial.model)
    trials.clear()
    del base
    _free(args.device)
    return {"rows": rows, "skipped": skipped}


def _time_rounds(trials: dict[str, Trial], rounds: int, warmup: int) -> dict[str, list[float]]:
    order, times = list(trials), {method: [] for method in trials}
    for number in range(warmup + rounds):
        start = number % len(order)
        for method in order[start:] + order[:start]:
            seconds = trials[method].seconds()
            if number >= warmup:
                times[method].append(seconds)
        _note(f"round {number + 1 - warmup} of {rounds}" if number >= warmup else "warm-up round")
    return times


def _paired(times: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def _moves(trial: Trial, rounds: int) -> dict[str, float]:
    """Times of collecting steps and of the move that ends a phase, against plain steps beside them."""
    plain, opening, adding, moving = [], [], [], []
    for _ in range(rounds):
        collection = Collection(trial.model)
        plain.append(trial.seconds())
        opening.append(trial.seconds(lambda c=collection: c.step(trial)))
        adding.append(trial.seconds(lambda c=collection: c.step(trial)))
        moving.append(trial.seconds(lambda c=collection: move_supports(c, trial.optimizer)))
    phase = [(a + (COLLECT_STEPS - 1) * b) / COLLECT_STEPS for a, b in zip(opening, adding, strict=True)]
    rest = [(INTERVAL - COLLECT_STEPS) * seconds for seconds in plain]
    return {
        "move_seconds": statistics.median(moving),
        "move_share": _paired(moving, rest),
        "collect_over_plain": _paired(phase, plain),
        "collect_first_over_plain": _paired(opening, plain),
        "collect_next_over_plain": _paired(adding, plain),
    }


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _note(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<40}", end="", file=sys.stderr, flush=True)


def _settings(args: argparse.Namespace, preset: Preset) -> dict[str, Any]:
    chosen = {name: getattr(args, name) for name in ("device", "preset", "clock", "rounds", "warmup", "methods")}
    return chosen | {"rank": RANK, "model": vars(preset)}


def _machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if device == "cpu" and _has_cpuinfo() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _has_cpuinfo() -> bool:
    return Path("/proc/cpuinfo").exists()


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--base", choices=("bf16", "fp32", "nf4", "all"), help="default: bf16 and fp32; cuda: and nf4")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int, help="multiple of 32")
    parser.add_argument("--tokens", type=int, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: time of this process alone")
    parser.add_argument("--output", type=Path, default=Path("runs/step_cost"))
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    args = parser.parse_args(argv)
    usual = ("bf16", "fp32") if args.device == "cpu" else ("bf16", "nf4")
    args.bases = {None: usual, "all": ("bf16", "fp32", "nf4")}.get(args.base, (args.base,))
    return args


if __name__ == "__main__":
    sys.exit(main())
