"""How well methods learn at equal trained numbers: each with its own learning-rate sweep, several seeds, spread shown.

    python recipes/benchmarks/learning.py                                   # the embedded demo task
    python recipes/benchmarks/learning.py --task cola --encoder PATH --data PATH
    python recipes/benchmarks/learning.py --candidates lora hybrid 'spiel-ag:density=0.02' --seeds 0 1 2
    python recipes/benchmarks/learning.py --group small --steps 60 --seeds 0  # every rank and tiny-core method by name

`--encoder` is a local sequence encoder (all-MiniLM-L6-v2, for one), `--data` a folder with CoLA's `train.tsv` and
`dev.tsv`. The budget is that of LoRA r=`--rank` on all targeted linears: in a candidate (harness.py says how one is
written) `$numbers` is that many, `$rank` the rank, `$half` half of it and `$rest` what half of the rank leaves. The
learning rate of each candidate is chosen with the first seed; all seeds run at the best one. So the first seed's score
at the chosen rate is slightly flattered, for every candidate alike. Runs that `learning.json` holds already are not
repeated. A table goes to the terminal, `learning.json` and `learning_<task>.png` to `--output`.

`--group small` and `--group structured` ask another question: does each method learn at all? Their candidates have
numbers of their own, and the rates of each (`SMALL`, `STRUCTURED`) lie around what its paper or a first look suggests.
Structured ones stand where their papers have them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import harness
import torch
from datasets import Dataset
from harness import Column, option
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

from hf_sparse_peft.methods import Method

# isort: split
import demo_data  # found by harness
from evaluation import exact_match, text_loss

DEMO_BASE = Path(__file__).resolve().parents[1] / "demo_base"
ENTRIES = "shira:budget={type: numbers, numbers: $numbers}"
HYBRID = "sparse-lora:r=$half,budget={type: numbers, numbers: $rest}"
CANDIDATES = {
    "lora": "lora:r=$rank,lora_alpha=$alpha",
    "entries": ENTRIES,
    "entries-largest": "super-tuning:budget={type: numbers, numbers: $numbers}",
    "entries-low-rank": f"{ENTRIES},criterion={{type: low_rank_magnitude, rank: 32}}",
    "entries-gradient": f"{ENTRIES},criterion=gradient",
    "fish": "fish:budget={type: numbers, numbers: $numbers}",
    "spiel-ag": "spiel-ag:budget={type: numbers, numbers: $numbers}",
    "hybrid": f"{HYBRID},criterion=random",
    "hybrid-fast-values": f"{HYBRID},criterion=random,values_ratio=3.0",
    "hybrid-largest": f"{HYBRID},criterion=magnitude",
    "hybrid-gradient": HYBRID,
    "hybrid-fisher": f"{HYBRID},criterion=fisher",
    "hybrid-regrown": "spiel-ag:r=$half,lora_alpha=$rank,budget={type: numbers, numbers: $rest}",
}
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
OWN_RATES = {"small": SMALL, "structured": STRUCTURED}
GROUPS = {"budget": list(CANDIDATES), **{group: list(named) for group, named in OWN_RATES.items()}}


@dataclass
class LearningOptions(harness.Options):
    """Options of this benchmark."""

    task: Literal["demo", "cola"] = option("demo", "what to learn")
    group: Literal["budget", "small", "structured"] = option(
        "budget", "candidates at equal numbers, or small or structured ones at their own"
    )
    candidates: list[str] = option([], "of the group, by default all, or methods")
    learning_rates: list[float] = option([], "rates to choose from; by default the candidate's, or the task's")
    seeds: list[int] = option([0, 1], "seeds of the data, the supports and the factors")
    steps: int = option(100, "optimizer steps of a run")
    batch_size: int = option(16, "examples of a step")
    test_examples: int = option(200, "word problems of the demo task to score on")
    rank: int = option(16, "rank of the LoRA whose trained numbers all get")
    encoder: Path | None = option(None, "model folder, for CoLA")
    data: Path | None = option(None, "folder with train.tsv and dev.tsv, for CoLA")


class DemoTask:
    """The word problems of `recipes/demo_data.py` on the embedded base; score: exact match, percent."""

    learning_rates = (1e-3, 3e-3, 1e-2)
    targets = "all-linear"
    head, head_rate = None, 0.0
    metric = "exact match, %"
    task_type = "CAUSAL_LM"

    def __init__(self, options: LearningOptions) -> None:
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


class ColaTask:
    """CoLA on a sentence encoder; score: Matthews correlation x 100 on the in-domain development set."""

    learning_rates = (2e-4, 5e-4, 1e-3)
    targets = r".*encoder.*(query|key|value|dense)"
    head, head_rate = ["pooler", "classifier"], 2e-3
    """The head is new, trains in full, and learns at one rate whatever the candidate."""
    metric = "Matthews correlation x 100"
    task_type = "SEQ_CLS"

    def __init__(self, options: LearningOptions) -> None:
        if not options.encoder or not options.data:
            raise SystemExit("--task cola needs --encoder (a model folder) and --data (a folder with CoLA's files).")
        self.encoder = options.encoder
        self.tokenizer = AutoTokenizer.from_pretrained(options.encoder)
        self.train, self.dev = (self._read(options.data / name) for name in ("train.tsv", "dev.tsv"))
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def _read(self, path: Path) -> Dataset:
        lines = [line.split("\t") for line in path.read_text().splitlines()]
        tokens = self.tokenizer([line[3] for line in lines], truncation=True, max_length=64)
        return Dataset.from_dict({**tokens, "labels": [int(line[1]) for line in lines]})

    def model(self) -> nn.Module:
        """A fresh encoder with a fresh head: the same for all candidates of a seed."""
        return AutoModelForSequenceClassification.from_pretrained(self.encoder, num_labels=2, dtype=torch.float32)

    def training_data(self, seed: int) -> dict[str, Any]:
        """Data of one run."""
        return {"train_dataset": self.train, "data_collator": self.collator}

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Matthews correlation of the predictions."""
        model.eval()
        predicted = []
        for at in range(0, len(self.dev), 128):
            batch = self.collator([self.dev[i] for i in range(at, min(at + 128, len(self.dev)))]).to(model.device)
            predicted += model(**batch).logits.argmax(-1).tolist()
        pairs = torch.tensor([self.dev["labels"], predicted], dtype=torch.float64)
        # Pearson's correlation of two 0/1 vectors; 0 where one of them is constant.
        return {"score": 100 * float(torch.corrcoef(pairs)[0, 1].nan_to_num())}


TASKS = {"demo": DemoTask, "cola": ColaTask}


def budget(task: Any, rank: int) -> dict[str, int]:
    """What `$name` means in a candidate: LoRA of `rank` sets the numbers in the targeted linears."""
    lora = harness.build_method("lora:r=1", target_modules=task.targets, task_type=task.task_type).config
    one = sum(p.numel() for n, p in get_peft_model(task.model(), lora).named_parameters() if "lora_" in n)
    half = rank // 2
    return {"rank": rank, "alpha": 2 * rank, "half": half, "numbers": rank * one, "rest": (rank - half) * one}


def with_head_rate(
    own: torch.optim.Optimizer | None, model: nn.Module, args: TrainingArguments, head_rate: float
) -> torch.optim.Optimizer | None:
    """The method's own optimizer, or Trainer's, with the new head in groups at `head_rate`; `own` without a head."""
    head = {id(p) for name, p in model.named_parameters() if "modules_to_save" in name}
    if not head:
        return own
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = own or torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    for group in list(optimizer.param_groups):
        new = [p for p in group["params"] if id(p) in head]
        group["params"] = [p for p in group["params"] if id(p) not in head]
        if new:
            optimizer.add_param_group({**group, "params": new, "lr": head_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def adapted(candidate: str, task: Any, numbers: dict[str, int], seed: int) -> tuple[Method, PeftModel]:
    """The candidate's method, and a fresh base with its adapter."""
    set_seed(seed)
    common = {"target_modules": task.targets, "task_type": task.task_type}
    if task.head:  # elsewhere a method's own modules train in full, such as norms
        common["modules_to_save"] = task.head
    method = harness.build_method(candidate, numbers, seed, **common)
    model = get_peft_model(task.model(), method.config)
    method.prepare(model)
    return method, model


def run(
    candidate: str, task: Any, options: LearningOptions, numbers: dict[str, int], rate: float, seed: int
) -> dict[str, Any]:
    """Train one candidate once and score it."""
    start = time.perf_counter()
    method, model = adapted(candidate, task, numbers, seed)
    args = harness.training_arguments(
        options,
        (options.output or Path("runs/learning")) / "run",
        rate,
        seed,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=max(1, options.steps // 20),
        train_sampling_strategy="group_by_length",  # less padding
        logging_strategy="no",
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad and not (task.head and "modules_to_save" in n)]
    trained = sum(model.get_parameter(name).numel() for name in names)
    more = task.training_data(seed)
    if task.head:
        more["adjust_optimizer"] = partial(with_head_rate, model=model, args=args, head_rate=task.head_rate)
    trainer = harness.make_trainer(method, model, args, **more)
    loss = trainer.train().training_loss
    row = {"trained": trained, "train_loss": loss, **task.score(model)}
    return row | {"seconds": time.perf_counter() - start}


def sweep(rows: harness.Rows, task: Any, options: LearningOptions) -> list[dict[str, Any]]:
    """Every candidate: all learning rates at the first seed, the other seeds at the best of them; a summary of each."""
    numbers, summaries = budget(task, options.rank), []
    for name in options.candidates or GROUPS[options.group]:
        candidate, rates = OWN_RATES.get(options.group, {}).get(name, (name, task.learning_rates))
        candidate = CANDIDATES.get(candidate, candidate)

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
    options = harness.parse(LearningOptions, __doc__, argv)
    task = TASKS[options.task](options)
    setting = {name: getattr(options, name) for name in ("task", "steps", "batch_size", "test_examples", "rank")}
    rows = harness.Rows(options, "learning", setting)
    summaries = sweep(rows, task, options)
    harness.print_table(f"{task.metric}: mean over seeds (lowest to highest)", COLUMNS, summaries)
    panels = {
        title: {row["candidate"]: [[run[key] for run in row["runs"]]] for row in summaries}
        for title, key in ((task.metric, "score"), ("training loss", "train_loss"))
    }
    sizes = f"numbers of LoRA r={options.rank}" if options.group == "budget" else "numbers of their own"
    title = f"{options.task}: {options.steps} steps of {options.batch_size}, {sizes}"
    picture = "learning" if options.group == "budget" else f"learning_{options.group}"
    harness.draw(
        rows.folder / f"{picture}_{options.task}.png", title, panels, ["mean, lowest and highest of the seeds"]
    )
    return summaries


if __name__ == "__main__":
    main()
