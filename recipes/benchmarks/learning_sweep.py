"""How well methods learn at equal trained numbers: each with its own learning-rate sweep, several seeds, spread shown.

    python recipes/benchmarks/learning_sweep.py                                   # the embedded demo task
    python recipes/benchmarks/learning_sweep.py --task cola --encoder PATH --data PATH
    python recipes/benchmarks/learning_sweep.py --candidates lora hybrid --learning_rates 1e-3 3e-3 --seeds 0 1 2

`--encoder` is a local sequence encoder (all-MiniLM-L6-v2, for one), `--data` a folder with CoLA's `train.tsv` and
`dev.tsv`. The budget is that of LoRA r=`--rank` on all targeted linears. The learning rate of each candidate is chosen
with the first seed; all seeds run at the best one. So the first seed's score at the chosen rate is slightly flattered,
for every candidate alike. Writes `learning_sweep_<task>.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import demo_data
from evaluation import exact_match, text_loss

from hf_sparse_peft import callbacks_for, methods
from hf_sparse_peft.optim import AgedAdamW

DEMO_BASE = Path(__file__).resolve().parents[1] / "demo_base"


@dataclass(frozen=True)
class Candidate:
    """A method of the registry at a share of the budget; `method=None` is upstream's LoRA at all of it."""

    method: str | None
    options: dict[str, Any] = field(default_factory=dict)
    factor_share: float = 0.0
    """Share of the trained numbers that go to the low-rank half; the rest go to the support."""
    values_ratio: float = 1.0
    """Learning rate of the support's values over that of everything else."""


def hybrid(criterion: str = "random", ratio: float = 1.0, method: str = "shira", **options: Any) -> Candidate:
    """Half of the numbers in factors, half in entries that `criterion` chose."""
    chosen = {} if method == "spiel-ag" else {"criterion": criterion}
    return Candidate(method, {**chosen, **options}, factor_share=0.5, values_ratio=ratio)


CANDIDATES: dict[str, Candidate] = {
    "lora": Candidate(None),
    "entries": Candidate("shira"),
    "entries-largest": Candidate("super-tuning"),
    "entries-low-rank": Candidate("shira", {"criterion": "low_rank_magnitude", "criterion_options": {"rank": 32}}),
    "spiel-ag": Candidate("spiel-ag"),
    "hybrid": hybrid(),
    "hybrid-slow-values": hybrid(ratio=0.3),
    "hybrid-fast-values": hybrid(ratio=3.0),
    "hybrid-largest": hybrid("magnitude"),
    "hybrid-smallest": hybrid("smallest_magnitude"),
    "hybrid-low-rank": hybrid("low_rank_magnitude", criterion_options={"rank": 32}),
    "hybrid-gradient": hybrid("gradient"),
    "hybrid-gradient-slow-values": hybrid("gradient", ratio=0.3),
    "hybrid-gradient-fast-values": hybrid("gradient", ratio=3.0),
    "entries-gradient": Candidate("shira", {"criterion": "gradient"}),
    "fish": Candidate("fish"),
    "hybrid-fisher": hybrid("fisher"),
    "hybrid-regrown": hybrid(method="spiel-ag"),
}


class DemoTask:
    """The word problems of `recipes/demo_data.py` on the embedded base; score: exact match, percent."""

    learning_rates = (1e-3, 3e-3, 1e-2)
    targets = "all-linear"
    head: tuple[str, ...] = ()
    head_rate = 0.0
    metric = "exact match, %"

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
        self.test = demo_data.word_problems(200, seed=0, split="test")
        self.held_out = demo_data.chunk_text(demo_data.pretraining_text(100, seed=0, split="heldout"), self.tokenizer)
        self.task_type = "CAUSAL_LM"

    def model(self) -> nn.Module:
        """A fresh base."""
        return AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)

    def trainer_options(self, seed: int) -> dict[str, Any]:
        """Data of one run."""
        pairs = demo_data.word_problems(3000, seed=seed, split="train")
        data = demo_data.tokenize_pairs(pairs, self.tokenizer)
        return {"train_dataset": data, "data_collator": DataCollatorForSeq2Seq(self.tokenizer)}

    def score(self, model: nn.Module) -> dict[str, float]:
        """Exact match, and the loss on held-out pretraining text (forgetting)."""
        return {
            "score": exact_match(model, self.tokenizer, self.test),
            "held_out_loss": text_loss(model, self.held_out),
        }


class ColaTask:
    """CoLA on a sentence encoder; score: Matthews correlation x 100 on the in-domain development set."""

    learning_rates = (2e-4, 5e-4, 1e-3)
    targets = r".*encoder.*(query|key|value|dense)"
    head = ("pooler", "classifier")
    head_rate = 2e-3
    """The head is new, trains in full, and learns at one rate whatever the candidate."""
    metric = "Matthews correlation x 100"

    def __init__(self, args: argparse.Namespace) -> None:
        if not args.encoder or not args.data:
            raise SystemExit("--task cola needs --encoder (a model folder) and --data (a folder with CoLA's files).")
        self.encoder = args.encoder
        self.tokenizer = AutoTokenizer.from_pretrained(args.encoder)
        self.train, self.dev = (self._read(args.data / name) for name in ("train.tsv", "dev.tsv"))
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.task_type = "SEQ_CLS"

    def _read(self, path: Path) -> Dataset:
        lines = [line.split("\t") for line in path.read_text().splitlines()]
        tokens = self.tokenizer([line[3] for line in lines], truncation=True, max_length=64)
        return Dataset.from_dict({**tokens, "labels": [int(line[1]) for line in lines]})

    def model(self) -> nn.Module:
        """A fresh encoder with a fresh head: the same for all candidates of a seed."""
        return AutoModelForSequenceClassification.from_pretrained(self.encoder, num_labels=2, dtype=torch.float32)

    def trainer_options(self, seed: int) -> dict[str, Any]:
        """Data of one run."""
        return {"train_dataset": self.train, "data_collator": self.collator}

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Matthews correlation of the predictions."""
        model.eval()
        predicted = []
        for at in range(0, len(self.dev), 128):
            batch = self.collator([self.dev[i] for i in range(at, min(at + 128, len(self.dev)))])
            predicted += model(**batch).logits.argmax(-1).tolist()
        return {"score": 100 * matthews(np.array(self.dev["labels"]), np.array(predicted))}


TASKS = {"demo": DemoTask, "cola": ColaTask}


def matthews(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews correlation of two 0/1 vectors: their Pearson correlation, 0 where one is constant."""
    if truth.std() == 0 or predicted.std() == 0:
        return 0.0
    return float(np.corrcoef(truth, predicted)[0, 1])


def budget(model: nn.Module, task: Any, rank: int) -> int:
    """Numbers that LoRA of that rank trains in the targeted linears."""
    config = LoraConfig(r=rank, target_modules=task.targets, task_type=task.task_type)
    adapted = get_peft_model(model, config)
    return sum(p.numel() for name, p in adapted.named_parameters() if p.requires_grad and "lora_" in name)


def prepare(candidate: Candidate, task: Any, args: argparse.Namespace, seed: int):
    """Adapted model, callbacks, optimizer factory and the numbers trained in adapted linears."""
    common = {"target_modules": task.targets, "task_type": task.task_type, "modules_to_save": list(task.head) or None}
    if candidate.method is None:
        return get_peft_model(task.model(), LoraConfig(r=args.rank, lora_alpha=2 * args.rank, **common)), []
    total = budget(task.model(), task, args.rank)
    r = round(candidate.factor_share * args.rank)
    entries = total - (budget(task.model(), task, r) if r else 0)
    options = {"r": r, "lora_alpha": 2 * max(r, 1), "num_entries": entries, "seed": seed, **common, **candidate.options}
    model = get_peft_model(task.model(), methods.get(candidate.method, **options).config)
    return model, callbacks_for(model)


def optimizer_for(model: nn.Module, task: Any, learning_rate: float, values_ratio: float) -> torch.optim.Optimizer:
    """AdamW without decay: values of supports (with ages) at `values_ratio` x the rate, a new head at its own."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    values = [p for name, p in trained if "sparse_lora_values" in name]
    head = [p for name, p in trained if "modules_to_save" in name]
    rest = [p for name, p in trained if "sparse_lora_values" not in name and "modules_to_save" not in name]
    groups = [
        {"params": values, "lr": learning_rate * values_ratio, "per_unit_age": True},
        {"params": head, "lr": task.head_rate, "per_unit_age": False},
        {"params": rest, "lr": learning_rate, "per_unit_age": False},
    ]
    return AgedAdamW([group for group in groups if group["params"]], lr=learning_rate, weight_decay=0.0)


def run(name: str, task: Any, args: argparse.Namespace, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train one candidate once and score it."""
    set_seed(seed)
    start = time.perf_counter()
    model, callbacks = prepare(CANDIDATES[name], task, args, seed)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)
    options = TrainingArguments(
        output_dir=str(args.output / "run"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        weight_decay=0.0,
        seed=seed,
        train_sampling_strategy="group_by_length",  # less padding
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=options,
        callbacks=callbacks,
        optimizers=(optimizer_for(model, task, learning_rate, CANDIDATES[name].values_ratio), None),
        **task.trainer_options(seed),
    )
    trainer.remove_callback(PrinterCallback)  # a row a run is enough
    loss = trainer.train().training_loss
    row = {"candidate": name, "learning_rate": learning_rate, "seed": seed, "trained": trained, "train_loss": loss}
    row |= task.score(model) | {"seconds": time.perf_counter() - start}
    print(json.dumps(row), flush=True)
    return row


def sweep(task: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every candidate: all learning rates at the first seed, the other seeds at the best of them."""
    rows = []
    for name in args.candidates:
        first = [run(name, task, args, rate, args.seeds[0]) for rate in args.learning_rates]
        best = max(first, key=lambda row: (row["score"], -row["train_loss"]))
        rows += first
        rows += [run(name, task, args, best["learning_rate"], seed) for seed in args.seeds[1:]]
        for row in rows:
            if row["candidate"] == name:
                row["chosen"] = row["learning_rate"] == best["learning_rate"]
    return rows


def print_results(rows: list[dict[str, Any]], task: Any) -> None:
    """Mean and spread over seeds at the chosen learning rate, best first; the other rates beside it."""
    table = Table(title=f"{task.metric}: mean over seeds (lowest to highest)")
    for column in ("candidate", "trained", "learning rate", "score", "train loss", "held-out loss", "other rates"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    lines = []
    for name in dict.fromkeys(row["candidate"] for row in rows):
        own = [row for row in rows if row["candidate"] == name]
        chosen = [row for row in own if row["chosen"]]
        scores = [row["score"] for row in chosen]
        held = [row["held_out_loss"] for row in chosen if "held_out_loss" in row]
        others = " ".join(f"{row['learning_rate']:g}:{row['score']:.1f}" for row in own if not row["chosen"])
        lines.append(
            (
                statistics.mean(scores),
                name,
                f"{chosen[0]['trained']:,}",
                f"{chosen[0]['learning_rate']:g}",
                f"{statistics.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})",
                f"{statistics.mean(row['train_loss'] for row in chosen):.3f}",
                f"{statistics.mean(held):.3f}" if held else "",
                others,
            )
        )
    for line in sorted(lines, reverse=True):
        table.add_row(*line[1:])
    Console(width=140).print(table)


def main(argv: list[str] | None = None) -> int:
    """Run the sweep, print and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=tuple(TASKS), default="demo")
    parser.add_argument("--candidates", nargs="+", choices=tuple(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--learning_rates", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA whose trained numbers all get")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/learning_sweep"))
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    task = TASKS[args.task](args)
    args.learning_rates = args.learning_rates or list(task.learning_rates)
    args.output.mkdir(parents=True, exist_ok=True)
    rows = sweep(task, args)
    settings = {"steps": args.steps, "batch_size": args.batch_size, "rank": args.rank, "torch": torch.__version__}
    report = {"task": args.task, "settings": settings, "rows": rows}
    (args.output / f"learning_sweep_{args.task}.json").write_text(json.dumps(report, indent=1) + "\n")
    print_results(rows, task)
    return 0


if __name__ == "__main__":
    sys.exit(main())
