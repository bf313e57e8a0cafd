"""Whether each method learns at all: by name, with options near its paper's, at the best of three learning rates.

    python recipes/benchmarks/learning_by_name.py --steps 40 --batch_size 8 --test_examples 100 --seeds 0
    python recipes/benchmarks/learning_by_name.py --group structured --candidates ssf 'ether:blocks=2'

The demo task of `recipes/demo_data.py`, which most of them solve: this does not rank methods (`learning.py` does, at
equal numbers). Candidates have numbers of their own, and the rates of each (`SMALL`, `STRUCTURED`) lie around what its
paper or a first look suggests. Structured ones stand where their papers have them. The learning rate is chosen with the
first seed; other seeds run at the best one. Runs that `learning_by_name.json` holds already are not repeated. A table
goes to the terminal, the file and `<group>_demo.png` to `--output`.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import harness
import torch
from harness import Column, option
from learning_runs import adapted, budget, run
from learning_tasks import DEMO_BASE
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

# isort: split
import demo_data  # found by harness
from evaluation import exact_match, text_loss

SLOW, LORA_RATES, FAST, FASTEST = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)
GROWTH = "[{type: grow_rank, every: 4, warmup: 4, modules: 7}, {type: orthogonality, weight: 0.1}]"
"""IncreLoRA within tens of steps, where the paper's runs are thousands long."""
SMALL = {
    "lora": ("lora:r=8,lora_alpha=16", LORA_RATES),
    "adalora": ("adalora", FAST),
    "adalora-peft": ("adalora-peft", FAST),
    "sora": ("sora", LORA_RATES),
    "dylora": ("dylora", LORA_RATES),
    "increlora": (f"increlora:schedule={GROWTH}", FAST),
    "maestro": ("maestro", LORA_RATES),
    "cuttlefish": ("cuttlefish:every=2,first=8", LORA_RATES),
    "lora-ggpo": ("lora-ggpo", LORA_RATES),
    "allora": ("allora", LORA_RATES),
    "joint-budget": ("joint-budget", LORA_RATES),
    "lora-xs": ("lora-xs:r=16", FAST),
    "edora": ("edora:r=16", FAST),
    "lora-sb": ("lora-sb:r=16", FAST),
    "svfit": ("svfit", FASTEST),
    "lamda": ("lamda:r=16", LORA_RATES),
    "lamda++": ("lamda++:r=16", LORA_RATES),
    "lora-mini": ("lora-mini", FAST),
    "loldu": ("loldu", FAST),
    "s2-lora": ("s2-lora", FAST),
    "sharelora": ("sharelora", LORA_RATES),
    "mos": ("mos", LORA_RATES),
    "nola": ("nola:k=64", FAST),
    "intrinsic-dimension": ("intrinsic-dimension", SLOW),
    "rosa": ("rosa:warmup=8", LORA_RATES),
    "smt": ("smt:block_size=32,mlp=0.0084,warmup_steps=4", LORA_RATES),
    "losia": ("losia:every=10", FAST),
    "paca": ("paca", FAST),
    "lisa": ("lisa:every=10", LORA_RATES),
    "lori": ("lori", LORA_RATES),
    "gora": ("gora", (3e-5, 1e-4, 3e-4)),
    "diablo": ("diablo", FAST),
    "lora-plus": ("lora-plus", (3e-4, 1e-3, 3e-3)),
    "dora": ("dora", LORA_RATES),
    "rslora": ("rslora", LORA_RATES),
    "pissa": ("pissa", LORA_RATES),
    "lora-ga": ("lora-ga", (3e-4, 1e-3, 3e-3)),
    "eva": ("eva:r=4", FAST),
    "randlora": ("randlora", LORA_RATES),
    "vb-lora": ("vb-lora:vector_length=64", FAST),
    "miss": ("miss", LORA_RATES),
    "loha": ("loha", FAST),
    "lokr": ("lokr", FAST),
    "gralora": ("gralora", LORA_RATES),
    "hira": ("hira", FAST),
    "hut-like": ("hut-like", FAST),
    "ln-tuning": ("ln-tuning:target_modules=null", FAST),
}
"""Methods whose ranks move or whose cores are tiny, and upstream's: candidate and learning rates."""
STRUCTURED = {
    "compacter": ("compacter:reduction=24", FASTEST),
    "loretta-rep": ("loretta-rep", FASTEST),
    "loretta-adp": ("loretta-adp", FAST),
    "flora": ("flora", LORA_RATES),
    "diffusekrona": ("diffusekrona", FAST),
    "surm": ("surm", FAST),
    "surm-toeplitz": ("surm:structure=toeplitz", LORA_RATES),
    "surm-kronecker": ("surm:structure=kronecker", FASTEST),
    "goft": ("goft", FAST),
    "qgoft": ("qgoft", FAST),
    "ether": ("ether:blocks=4", FAST),
    "ether+": ("ether+:blocks=4", LORA_RATES),
    "ssf": ("ssf", FAST),
    "houlsby": ("houlsby", (3e-4, 1e-3, 3e-3)),
    "hyperformer": ("hyperformer", (3e-5, 1e-4, 3e-4)),
    "mpoe": ("mpoe", (3e-4, 1e-3, 3e-3)),
    "1-bit-adapters": ("1-bit-adapters", LORA_RATES),
    "molora": ("molora", (3e-4, 1e-3, 3e-3)),
    "mov": ("mov", FASTEST),
    "sira": ("sira", LORA_RATES),
}
"""Structured adapters where their papers have them: candidate and learning rates."""
GROUPS = {"small": SMALL, "structured": STRUCTURED}


@dataclass
class NamedOptions(harness.Options):
    """Options of this benchmark."""

    group: Literal["small", "structured"] = option("small", "which table of methods")
    candidates: list[str] = option([], "of the group, by default all, or methods")
    learning_rates: list[float] = option([], "rates to choose from; by default the candidate's, or LoRA's")
    seeds: list[int] = option([0, 1], "seeds of the data, the supports and the factors")
    steps: int = option(100, "optimizer steps of a run")
    batch_size: int = option(16, "examples of a step")
    test_examples: int = option(200, "word problems to score on")


class DemoTask:
    """The word problems of `recipes/demo_data.py` on the embedded base; score: exact match, percent."""

    targets = "all-linear"
    head, head_rate = None, 0.0
    metric = "exact match, %"
    task_type = "CAUSAL_LM"

    def __init__(self, options: NamedOptions) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
        self.test = demo_data.word_problems(options.test_examples, seed=0, split="test")
        self.data: dict[int, dict[str, Any]] = {}
        self.held_out = demo_data.chunk_text(demo_data.pretraining_text(100, seed=0, split="heldout"), self.tokenizer)

    def model(self) -> nn.Module:
        """A fresh base."""
        return AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)

    def training_data(self, seed: int) -> dict[str, Any]:
        """Data of one run."""
        if seed not in self.data:
            pairs = demo_data.word_problems(3000, seed=seed, split="train")
            data = demo_data.tokenize_pairs(pairs, self.tokenizer)
            self.data[seed] = {"train_dataset": data, "data_collator": DataCollatorForSeq2Seq(self.tokenizer)}
        return dict(self.data[seed])

    def score(self, model: nn.Module) -> dict[str, float]:
        """Exact match, and the loss on held-out pretraining text (forgetting)."""
        score = exact_match(model, self.tokenizer, self.test)
        return {"score": score, "held_out_loss": text_loss(model, self.held_out)}


def sweep(rows: harness.Rows, task: DemoTask, options: NamedOptions) -> list[dict[str, Any]]:
    """Every candidate: all learning rates at the first seed, the other seeds at the best of them; a summary of each."""
    numbers, summaries, group = budget(task, 16, options.steps), [], GROUPS[options.group]
    for name in options.candidates or group:
        candidate, rates = group.get(name, (name, LORA_RATES))

        def measured(rate: float, seed: int, name: str = name, candidate: str = candidate) -> dict[str, Any]:
            work = partial(run, candidate, task, options, numbers, rate, seed)
            return rows.measure(work, candidate=name, learning_rate=rate, seed=seed)

        def untrained(candidate: str = candidate) -> dict[str, Any]:
            return task.score(adapted(candidate, task, numbers, options.seeds[0])[1])

        before = rows.measure(untrained, candidate=name, learning_rate=0.0, seed=options.seeds[0])
        first = [measured(rate, options.seeds[0]) for rate in options.learning_rates or rates]
        best = max(first, key=lambda row: (row["score"], -row["train_loss"]))
        runs = [best, *(measured(best["learning_rate"], seed) for seed in options.seeds[1:])]
        others = " ".join(f"{row['learning_rate']:g}:{row['score']:.1f}" for row in first if row is not best)
        summaries.append(
            best | {"before": before["score"], "runs": runs, "mean": _mean(runs, "score"), "others": others}
        )
    return sorted(summaries, key=lambda row: -row["mean"])


def _mean(runs: list[dict[str, Any]], key: str) -> float | None:
    return statistics.mean(row[key] for row in runs) if key in runs[0] else None


def _spread(row: dict[str, Any]) -> str:
    scores = [run["score"] for run in row["runs"]]
    return f"{row['mean']:.1f} ({min(scores):.1f} to {max(scores):.1f})"


COLUMNS = (
    Column("candidate", "candidate"),
    Column("trained", "trained", "{:,}"),
    Column("learning rate", "learning_rate", "{:g}"),
    Column("score before", "before", "{:.1f}"),
    Column("score", _spread),
    Column("train loss", lambda row: _mean(row["runs"], "train_loss"), "{:.3f}"),
    Column("held-out loss", lambda row: _mean(row["runs"], "held_out_loss"), "{:.3f}"),
    Column("other rates", "others"),
)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the sweep, print, draw and write it; returns a summary of each candidate, best first."""
    options = harness.parse(NamedOptions, __doc__, argv)
    task = DemoTask(options)
    setting = {name: getattr(options, name) for name in ("steps", "batch_size", "test_examples")}
    rows = harness.Rows(options, "learning_by_name", setting)
    summaries = sweep(rows, task, options)
    harness.print_table(f"{task.metric}: mean over seeds (lowest to highest)", COLUMNS, summaries)
    panels = {
        title: {row["candidate"]: [[run[key] for run in row["runs"]]] for row in summaries}
        for title, key in ((task.metric, "score"), ("training loss", "train_loss"))
    }
    title = f"{options.steps} steps of {options.batch_size}, numbers of their own"
    path = rows.folder / f"{options.group}_demo.png"
    harness.draw(path, title, panels, ["mean, lowest and highest of the seeds"])
    return summaries


if __name__ == "__main__":
    main()
