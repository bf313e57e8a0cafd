"""Three tasks, an adapter each, and one adapter of the three: what is left of each task, method by method.

Without arguments it runs offline on the demo base: word problems answered in digits, in words, and by what was counted.

    python recipes/merge_adapters.py
    python recipes/merge_adapters.py 'merge=[ties:density=0.5, "dare:rate=0.5"]'   # other methods, with options
    python recipes/merge_adapters.py adapter.r=8 adapter.density=0                 # of low-rank adapters

Adapters are trained one by one, each on a fresh base; merging reads their files only.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import datasets
import demo_data
import torch
import yaml
from evaluation import exact_match
from peft import PeftModel, get_peft_model
from reporting import print_table
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from hf_sparse_peft.finetuning import method_of_card
from hf_sparse_peft.merging import merge_adapters

TASKS = ("digits", "words", "things")


@dataclass
class RecipeArguments(common.RecipeArguments):
    """What to train, and how to merge it."""

    merge: list[str] = field(
        default_factory=lambda: ["sum", "soup", "ties:density=1.0"],
        metadata={"help": "Methods of merging, `name` or `name:option=value,...`."},
    )


def as_task(task: str, row: dict) -> dict:
    """A word problem, asked for its number in digits or in words, or for the things."""
    if task == "words":
        answer = f" {demo_data.WORDS[int(row['answer'])]}"
        return {"prompt": row["prompt"].replace("Answer :", "In words :"), "answer": answer}
    if task == "things":
        story, _, question = row["prompt"].partition("How many ")
        thing, _, rest = question.partition(" ")
        return {"prompt": f"{story}What {rest}", "answer": f" {thing}"}
    return row


def rows_of(task: str, count: int, seed: int, split: str) -> datasets.Dataset:
    """Prompts and answers of a task; splits share no sum."""
    return demo_data.word_problems(count, seed=seed, split=split).map(lambda row: as_task(task, row))


def train_task(task: str, rows: datasets.Dataset, recipe: Any, args: TrainingArguments, folder: Path) -> float:
    """Train an adapter for a task on a fresh base and save it; returns the training loss."""
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = common.load_base(AutoModelForCausalLM, name, recipe, args)
    method = common.choose_method(recipe, {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}, args.seed)
    model = get_peft_model(base, method.config)
    own = copy.copy(args)
    own.output_dir = str(folder.parent / f"{task}_run")
    data = {"train_dataset": demo_data.tokenize_pairs(rows, tokenizer)}
    trainer = common.make_trainer(method, model, own, data | {"data_collator": DataCollatorForSeq2Seq(tokenizer)})
    loss = trainer.train().training_loss
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    card = {**method_of_card(method), "training_data": f"word problems of recipes/demo_data.py, in {task}"}
    common.save_adapter(model, folder, **card)
    return loss


@torch.no_grad()
def answer_loss(model: PeftModel, tokenizer: Any, rows: datasets.Dataset) -> float:
    """Mean loss in nats of a token of the answers."""
    model.eval()
    total = count = 0.0
    collate = DataCollatorForSeq2Seq(tokenizer)
    for batch in DataLoader(demo_data.tokenize_pairs(rows, tokenizer), batch_size=50, collate_fn=collate):
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + tokens * float(model(**batch).loss), count + tokens
    return total / count


def scores(
    folder: Path | None, name: str, tests: dict[str, datasets.Dataset], generate: bool = True
) -> dict[str, float]:
    """Loss and, with `generate`, exact match in percent of each task, with the adapter in `folder` on the base `name`,
    or of the base alone."""
    model = AutoModelForCausalLM.from_pretrained(name)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    tokenizer = AutoTokenizer.from_pretrained(name)
    found = {f"{task}_loss": answer_loss(model, tokenizer, rows) for task, rows in tests.items()}
    if generate:
        found |= {task: exact_match(model, tokenizer, rows, max_new_tokens=3) for task, rows in tests.items()}
    return found


def method_and_options(text: str) -> tuple[str, dict[str, Any]]:
    """`name:option=value,...` in its parts, values as YAML writes them."""
    name, _, options = text.partition(":")
    return name, yaml.safe_load("{" + re.sub(r"(\w+)=", r"\1: ", options) + "}")


def main(argv: list[str]) -> common.Figures:
    """Train, merge, measure; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    output, name = Path(args.output_dir), recipe.model_name_or_path or common.DEMO_BASE
    folders = {task: output / task for task in TASKS}
    figures: common.Figures = {}
    for task, folder in folders.items():
        rows = rows_of(task, recipe.train_examples or 1000, args.seed, "train")
        figures[f"{task}_train_loss"] = train_task(task, rows, recipe, args, folder)
    tests = {task: rows_of(task, recipe.test_examples, args.seed, "test") for task in TASKS}
    measured = {"base": scores(None, name, tests)}
    for task in TASKS:
        measured[f"adapter of {task}"] = scores(folders[task], name, tests)
    losses: dict[tuple[str, Path], float] = {}
    for text in recipe.merge:
        method, options = method_and_options(text)
        out = output / "merged" / re.sub(r"\W+", "-", text)
        report = merge_adapters(list(folders.values()), out, method, show_progress=False, **options)
        error = max(report.errors.values(), default=0.0)
        measured[text] = {**scores(out, name, tests), "error": error}
        losses[text, out] = sum(measured[text][f"{task}_loss"] for task in TASKS)
    for row, found in measured.items():
        figures |= {f"{row}: {figure}": value for figure, value in found.items()}
    figures["train_loss"] = sum(figures[f"{task}_train_loss"] for task in TASKS) / len(TASKS)
    best, folder = min(losses, key=losses.get)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), str(folder))
    notes = f"Adapters of {', '.join(TASKS)}, merged by {best}; recipes/merge_adapters.py, seed {args.seed}."
    common.save_adapter(model, output / "adapter", notes=notes, training_data="word problems of recipes/demo_data.py")
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    rows = [
        (
            row,
            *(f"{found[task]:.0f} ({found[f'{task}_loss']:.2f})" for task in TASKS),
            f"{found['error']:.1e}" if found.get("error") else "",
        )
        for row, found in measured.items()
    ]
    print_table(rows, title="three tasks: exact match in % (loss of an answer's token)", columns=(*TASKS, "error"))
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
