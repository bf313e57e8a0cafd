"""A long run: does memory grow, does a step get slower, can the log be read?

    python tests/endurance/long_run.py --steps 5000 --every 20     # 250 moves

Trains a small Llama with supports that move, telemetry and checkpoints, and prints for every fifth of the steps the
resident memory, the CPU time of a step (median, of this process: other processes do not count), and what a move costs.
Ends with 1 where the last fifth holds more than 3 % more memory than the second, or takes more than 1.25 times as long.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", OMP_NUM_THREADS="1")
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import tiny
import torch
from endurance.work import TARGETS, readable_log
from peft import get_peft_model
from transformers import Trainer, TrainerCallback

from hf_sparse_peft import AccumulatedGradient, AgedAdamWSpec, Regrow, SparseLoraConfig, SupportTelemetryCallback
from hf_sparse_peft import trainer_options as options_for

GROWTH, SLOWER = 0.03, 1.25


@dataclass
class Curve(TrainerCallback):
    """Memory and CPU time of every step."""

    memory: list[int] = field(default_factory=list)
    """Resident bytes behind each step."""
    times: list[float] = field(default_factory=list)
    """CPU seconds of each."""
    _began: float = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Start the clock."""
        self._began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Stop it, and read the process's size."""
        self.times.append(time.process_time() - self._began)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * resource.getpagesize())


@dataclass(frozen=True)
class Part:
    """A stretch of the run."""

    first: int
    last: int
    memory: float
    """Mean resident bytes."""
    step: float
    """Median CPU seconds of a step without a move."""
    move: float
    """Median of the steps that end with one."""


def run(out: Path, steps: int, every: int, parts: int = 5) -> tuple[list[Part], int]:
    """Train; returns the curve in equal parts, and how many moves there were.

    Raises:
        AssertionError: the log of telemetry is not readable line by line, or lacks a record.
    """
    torch.manual_seed(0)
    config = SparseLoraConfig(
        r=2, density=0.1, optimizer=AgedAdamWSpec(),
        schedule=[Regrow(every=every, grow=AccumulatedGradient(steps=2), fraction=0.3)], **TARGETS,
    )  # fmt: skip
    model = get_peft_model(tiny.llama(layers=1), config)
    options = {
        "save_strategy": "steps", "save_steps": max(steps // 10, 1), "save_total_limit": 2, "logging_steps": 50,
        "logging_strategy": "steps", "per_device_train_batch_size": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    found = options_for(model, tiny.arguments(out, steps, **options))
    curve, telemetry = Curve(), SupportTelemetryCallback(every=every)
    found["callbacks"] = [*found["callbacks"], telemetry, curve]
    trainer = Trainer(model=model, train_dataset=tiny.TokenData(64), **found)
    trainer.train()
    readable_log(out / "support_log.jsonl", steps)
    lines = (out / "support_log.jsonl").read_text().splitlines()
    assert len(lines) == steps // every + 1 + (steps % every > 0), len(lines)
    assert max(map(len, lines)) < 4096
    assert json.loads((out / f"checkpoint-{steps}" / "trainer_state.json").read_text())["global_step"] == steps
    moves = {event["step"] for event in found["callbacks"][0].events if event.get("replaced")}
    edges = [round(steps * number / parts) for number in range(parts + 1)]
    return [_part(curve, moves, *pair) for pair in itertools.pairwise(edges)], len(moves)


def _part(curve: Curve, moves: set[int], first: int, last: int) -> Part:
    moved = [curve.times[at] for at in range(first, last) if at in moves or at + 1 in moves]
    plain = [curve.times[at] for at in range(first, last) if at not in moves and at + 1 not in moves]
    move = statistics.median(moved) if moved else 0.0
    return Part(first, last, statistics.mean(curve.memory[first:last]), statistics.median(plain), move)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=20, help="steps between two moves")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="long-run-") as folder:
        parts, moves = run(Path(folder), asked.steps, asked.every)
        log = (Path(folder) / "support_log.jsonl").stat().st_size
    for part in parts:
        print(
            f"steps {part.first + 1:>6} to {part.last:>6}  {part.memory / 2**20:8.2f} MiB  {part.step * 1e3:7.2f} ms a "
            f"step  {part.move * 1e3:7.2f} ms where units move"
        )
    growth, slower = parts[-1].memory / parts[1].memory - 1, parts[-1].step / parts[1].step
    print(
        f"{moves} moves, from the second part to the last memory {growth:+.2%} and step time x {slower:.3f}; "
        f"a log of {log} bytes; {time.monotonic() - began:.0f} s"
    )
    return int(growth > GROWTH or slower > SLOWER)


if __name__ == "__main__":
    sys.exit(main())
