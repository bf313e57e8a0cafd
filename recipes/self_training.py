"""Few labels and much text without any: a teacher labels, a student learns from what helps (LiST; Wang et al., 2022).

Without arguments it runs offline on the demo base: is something gained or lost in a story?

    python recipes/self_training.py
    python recipes/self_training.py --labels 16 --sessions 4

Each session begins a student anew, from the base with fresh adapters and a fresh optimizer; the teacher is the student
before it. First the student fits the teacher's soft labels on unlabelled rows: for the first 60 % of the steps all
count alike, then each by what learning from it does to the loss of a few labelled rows (`meta_weights`). Then it trains
on the labels. Adapters are the paper's, `y + W2 W1 y` behind attention's output and the FFN's (`Bottleneck`, identity,
no biases, N(0, 2e-4)), and a head; they merge into the linear before them. The paper tunes by prompts and starts with
50 epochs on the labels; here a head classifies, and the numbers of steps are small. Figures go to `--output_dir`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import _quiet  # noqa: F401
import demo_data
import torch
from peft import PeftModel, get_peft_model
from reporting import print_table
from sequence_classification import gained
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_sparse_peft.training import meta_weights, soft_label_losses
from hf_sparse_peft.tuners.structured import Bottleneck, DenseMatrix, StructuredConfig

DEMO_BASE = Path(__file__).parent / "demo_base"
Rows = tuple[dict[str, Tensor], Tensor]
"""Inputs and labels."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(DEMO_BASE), help="base; the demo's by default")
    parser.add_argument("--target_modules", nargs="+", default=["o_proj", "down_proj"], help="where adapters stand")
    parser.add_argument("--size", type=int, default=128, help="width of an adapter (paper: 128)")
    parser.add_argument("--labels", type=int, default=8, help="labelled rows (paper: 10 to 30)")
    parser.add_argument("--unlabelled", type=int, default=500, help="rows without labels")
    parser.add_argument("--test_examples", type=int, default=200, help="rows to score on")
    parser.add_argument("--sessions", type=int, default=2, help="students after the first (paper: 6)")
    parser.add_argument("--steps", type=int, default=40, help="steps on soft labels of a session (paper: 1000)")
    parser.add_argument("--label_steps", type=int, default=15, help="steps on the labels")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of a step")
    parser.add_argument("--validation_rows", type=int, default=4, help="labelled rows that examples are weighed by")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of AdamW, without decay (paper: 1e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of rows, adapters and batches")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/self_training"), help="adapter and figures")
    return parser.parse_args(argv)


def new_student(options: argparse.Namespace, session: int) -> PeftModel:
    """The base with fresh adapters and a fresh head."""
    torch.manual_seed(options.seed + session)
    base = AutoModelForSequenceClassification.from_pretrained(
        options.model_name_or_path, num_labels=2, dtype=torch.float32
    )
    base.config.pad_token_id = base.config.pad_token_id or base.config.eos_token_id
    form = Bottleneck(size=options.size, activation="identity", biases=False, matrix=DenseMatrix("normal", 2e-4))
    config = StructuredConfig(form=form, target_modules=options.target_modules, task_type="SEQ_CLS")
    return get_peft_model(base, config)


def rows_of(options: argparse.Namespace) -> dict[str, Rows]:
    """Labelled, unlabelled and test rows; no story is in two of them."""
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    count = options.labels + options.unlabelled
    train = demo_data.word_problems(count, seed=options.seed, split="train").map(gained)
    test = demo_data.word_problems(options.test_examples, seed=options.seed, split="test").map(gained)

    def encoded(part: Any) -> Rows:
        found = tokenizer(list(part["text"]), padding=True, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask")}, torch.tensor(part["label"])

    labelled, rest = train.select(range(options.labels)), train.select(range(options.labels, count))
    return {"labelled": encoded(labelled), "unlabelled": encoded(rest), "test": encoded(test)}


def picked(rows: Rows, places: Tensor) -> Rows:
    """Some of the rows."""
    return {key: value[places] for key, value in rows[0].items()}, rows[1][places]


@torch.no_grad()
def accuracy(model: PeftModel, rows: Rows) -> float:
    """Fraction that the model puts into their class."""
    model.eval()
    guesses = torch.cat([model(**picked(rows, at)[0]).logits.argmax(-1) for at in torch.arange(len(rows[1])).split(64)])
    return float((guesses == rows[1]).float().mean())


def fit_teacher(student: PeftModel, teacher: PeftModel, rows: dict[str, Rows], options: Any, optimizer: Any) -> float:
    """Steps on unlabelled rows by the teacher's soft labels; returns the mean share of rows that had a weight."""
    shares = []
    for step in range(options.steps):
        x, _ = picked(rows["unlabelled"], torch.randint(len(rows["unlabelled"][1]), (options.batch_size,)))
        with torch.no_grad():
            target = teacher(**x).logits
        weights = torch.full((options.batch_size,), 1 / options.batch_size)
        if step >= 0.6 * options.steps:
            few = picked(rows["labelled"], torch.randint(options.labels, (options.validation_rows,)))
            student.eval()
            weights = meta_weights(
                student.parameters(),
                lambda x=x, target=target: soft_label_losses(student(**x).logits, target),
                lambda few=few: F.cross_entropy(student(**few[0]).logits, few[1]),
            )
            shares.append(float((weights > 0).float().mean()))
        student.train()
        (weights * soft_label_losses(student(**x).logits, target)).sum().backward()
        optimizer.step(), optimizer.zero_grad()
    return sum(shares) / max(1, len(shares))


def fit_labels(student: PeftModel, rows: Rows, options: Any, optimizer: Any) -> None:
    """Steps on the labelled rows."""
    student.train()
    for _ in range(options.label_steps):
        x, labels = picked(rows, torch.randint(options.labels, (options.batch_size,)))
        F.cross_entropy(student(**x).logits, labels).backward()
        optimizer.step(), optimizer.zero_grad()


def main(argv: list[str]) -> list[dict[str, float]]:
    """Train session after session; returns the figures of each."""
    options = parse(argv)
    rows, figures, teacher = rows_of(options), [], None
    for session in range(options.sessions + 1):
        student = new_student(options, session)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
        found = {"session": session}
        if teacher is not None:
            found["weighted"] = fit_teacher(student, teacher, rows, options, optimizer)
            found["after soft labels"] = accuracy(student, rows["test"])
        fit_labels(student, rows["labelled"], options, optimizer)
        found["accuracy"] = accuracy(student, rows["test"])
        figures.append(found)
        teacher = student.eval()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    teacher.save_pretrained(options.output_dir / "adapter")
    (options.output_dir / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    columns = ("after soft labels", "accuracy")
    table = [
        (f"session {row['session']}", *(f"{row[key]:.1%}" if key in row else "" for key in columns)) for row in figures
    ]
    print_table(table, f"{options.labels} labels, {options.unlabelled} rows without", columns)
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
