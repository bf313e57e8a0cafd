"""Direct preference optimization of a sparse adapter on a 4-bit base; the reference is the base without it; trl.

Without arguments it runs offline on the demo base, which answers in words and is to prefer digits:

    python recipes/dpo.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import common
import datasets
import demo_data
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


@dataclass
class RecipeArguments(common.DataArguments):
    """What to train on which pairs: columns `chosen` and `rejected`, and `prompt` where they are no conversations."""


def load_preferences(recipe: RecipeArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test rows of a chosen and a rejected answer."""
    if recipe.dataset_name:
        wanted = ("prompt", "chosen", "rejected")
        train, test = common.load_splits(recipe, seed)
        return tuple(rows.select_columns([c for c in wanted if c in rows.column_names]) for rows in (train, test))
    counts = {"train": recipe.train_examples or 1000, "test": recipe.test_examples}
    pairs = [demo_data.word_problems(count, seed=seed, split=split) for split, count in counts.items()]
    return tuple(rows.map(in_digits_not_words, remove_columns=["answer"]) for rows in pairs)


def in_digits_not_words(row: dict) -> dict:
    """A word problem whose right answer is preferred in digits."""
    return {"chosen": row["answer"], "rejected": f" {demo_data.WORDS[int(row['answer'])]} ."}


def main(argv: list[str]) -> common.Figures:
    """Train; measure how often held-out answers are ranked right; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, DPOConfig)
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = common.load_base(AutoModelForCausalLM, name, recipe, args)
    train, test = load_preferences(recipe, args.seed)
    return common.fine_tune(
        __file__, recipe, args, base,
        data={"train_dataset": train, "eval_dataset": test, "processing_class": tokenizer},
        measure=lambda trainer: common.evaluated(trainer, "loss", "rewards/accuracies", "rewards/margins"),
        shown={
            "loss": ("loss of held-out pairs", ".3f"),
            "rewards/accuracies": ("chosen answer ahead of the rejected", ".1%"),
            "rewards/margins": ("by how much, nats times beta", ".3f"),
        },
        source=recipe.dataset_name or "word problems that recipes/demo_data.py generates, digits over words",
        defaults={"task_type": "CAUSAL_LM", "target_modules": "all-linear"},
        trainer_class=DPOTrainer,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
