"""Two tasks in turn, and what the second does to the first and to the base's text.

Without arguments it runs offline on the demo base: sums in digits, then sums in words.

    python recipes/continual.py
    python recipes/continual.py strategy=two            # an adapter a task: the first cannot be forgotten
    python recipes/continual.py adapter.density=0.002   # fewer entries, less of both

The table has each task's exact match after each of the two, and the loss on text that neither is about.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import common
import datasets
import demo_data
from evaluation import exact_match, text_loss
from peft import PeftModel, get_peft_model
from reporting import print_table
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from hf_sparse_peft.finetuning import method_of_card

TASKS = ("digits", "words")


@dataclass
class RecipeArguments(common.RecipeArguments):
    """What to train in turn."""

    strategy: Literal["one", "two"] = field(
        default="one", metadata={"help": "One adapter for both tasks, or one for each, of which the task's is active."}
    )


def asked_in_words(row: dict) -> dict:
    """A word problem whose answer is to be a word."""
    answer = f" {demo_data.WORDS[int(row['answer'])]}"
    return {"prompt": row["prompt"].replace("Answer :", "In words :"), "answer": answer}


def tasks(recipe: RecipeArguments, seed: int) -> dict[str, tuple[datasets.Dataset, datasets.Dataset]]:
    """Training and test rows of each task."""
    counts = {"train": recipe.train_examples or 1000, "test": recipe.test_examples}
    digits = tuple(demo_data.word_problems(count, seed=seed, split=split) for split, count in counts.items())
    return {"digits": digits, "words": tuple(rows.map(asked_in_words) for rows in digits)}


def adapter_of(task: str, recipe: RecipeArguments) -> str:
    """Name of the adapter that answers a task."""
    return "default" if recipe.strategy == "one" or task == TASKS[0] else "second"


def main(argv: list[str]) -> common.Figures:
    """Train both tasks in turn, measure both after each; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = common.load_base(AutoModelForCausalLM, name, recipe, args)
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    method = common.choose_method(recipe, defaults, args.seed)
    model = get_peft_model(base, method.config)
    data = tasks(recipe, args.seed)
    held_out = demo_data.chunk_text(demo_data.pretraining_text(100, seed=0, split="heldout"), tokenizer)
    figures: common.Figures = {}

    def measure(when: str, seen: str | None) -> None:
        for task, (_, test) in data.items():
            if adapter_of(task, recipe) in model.peft_config:
                model.set_adapter(adapter_of(task, recipe))
            figures[f"{task}_{when}"] = exact_match(model, tokenizer, test)
        if seen is not None:
            model.set_adapter(adapter_of(seen, recipe))
        figures[f"text_{when}"] = text_loss(model, held_out)

    measure("before", None)
    for task, (train, _) in data.items():
        adapter = adapter_of(task, recipe)
        if adapter not in model.peft_config:
            model.add_adapter(adapter, common.choose_method(recipe, defaults, args.seed + 1).config)
        model.set_adapter(adapter)
        own = copy.copy(args)
        own.output_dir = str(Path(args.output_dir) / task)
        rows = {"train_dataset": demo_data.tokenize_pairs(train, tokenizer)}
        trainer = common.make_trainer(method, model, own, rows | {"data_collator": DataCollatorForSeq2Seq(tokenizer)})
        figures[f"{task}_train_loss"] = trainer.train().training_loss
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        measure(f"after_{task}", task)
    figures["forgotten"] = figures["digits_after_digits"] - figures["digits_after_words"]
    figures["train_loss"] = sum(figures[f"{task}_train_loss"] for task in TASKS) / len(TASKS)
    finish(model, method, recipe, args, figures)
    return figures


def finish(model: PeftModel, method, recipe: RecipeArguments, args: TrainingArguments, figures: common.Figures) -> None:
    """Write the adapters and the figures, print the table."""
    output = Path(args.output_dir)
    card = {
        **method_of_card(method), "metrics": {key: round(value, 4) for key, value in figures.items()},
        "training_data": "word problems that recipes/demo_data.py generates, answered in digits and in words",
        "notes": f"{args.max_steps} steps a task, strategy={recipe.strategy}, seed {args.seed}; recipes/continual.py.",
    }  # fmt: skip
    for adapter in model.peft_config:
        common.save_adapter(
            model, output / ("adapter" if adapter == "default" else adapter), adapter_name=adapter, **card
        )
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    rows = [
        (f"{label} after {task}", f"{figures[f'{key}_before']:{form}}", f"{figures[f'{key}_after_{task}']:{form}}")
        for task in TASKS
        for key, label, form in (
            ("digits", "digits, exact match, %,", ".1f"), ("words", "words, exact match, %,", ".1f"),
            ("text", "loss on held-out pretraining text", ".3f"),
        )
    ]  # fmt: skip
    rows.append(("forgotten of digits, points", "", f"{figures['forgotten']:.1f}"))
    print_table(rows, title=f"two tasks in turn, strategy={recipe.strategy}")


if __name__ == "__main__":
    main(sys.argv[1:])
