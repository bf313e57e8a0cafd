"""Classification of texts: a 4-bit base with a head that trains whole, and a sparse adapter below it.

Without arguments it runs offline on the demo base: is something gained or lost in a story?

    python recipes/sequence_classification.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import common
import datasets
import demo_data
import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments


@dataclass
class RecipeArguments(common.DataArguments):
    """What to classify."""

    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Column of the text, or of its two parts."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the class, a number from 0 on."})
    max_length: int = field(default=256, metadata={"help": "Longest text in tokens; the end is cut."})


def load_texts(recipe: RecipeArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test rows."""
    if recipe.dataset_name:
        return common.load_splits(recipe, seed)
    counts = {"train": recipe.train_examples or 1000, "test": recipe.test_examples}
    pairs = [demo_data.word_problems(count, seed=seed, split=split) for split, count in counts.items()]
    return tuple(rows.map(gained, remove_columns=rows.column_names) for rows in pairs)


def gained(row: dict) -> dict:
    """The story of a word problem, and whether something is gained in it."""
    story = row["prompt"].partition(" How many")[0]
    return {"text": story, "label": int(story.endswith("more ."))}


def accuracy(predicted) -> dict[str, float]:
    """Fraction of rows whose largest logit is that of the label."""
    return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


def main(argv: list[str]) -> common.Figures:
    """Train and measure; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, test = load_texts(recipe, args.seed)
    classes = common.class_count(train, recipe.label_column)
    base = common.load_base(AutoModelForSequenceClassification, name, recipe, args, num_labels=classes)
    base.config.pad_token_id = tokenizer.pad_token_id

    def encode(row):
        texts = (row[column] for column in recipe.text_columns)
        return tokenizer(*texts, truncation=True, max_length=recipe.max_length) | {"label": row[recipe.label_column]}

    rows = [part.map(encode, remove_columns=part.column_names) for part in (train, test)]
    return common.fine_tune(
        __file__, recipe, args, base,
        data={
            "train_dataset": rows[0], "eval_dataset": rows[1], "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": accuracy,
        },
        measure=lambda trainer: common.evaluated(trainer, "loss", "accuracy"),
        shown={"loss": ("loss of held-out texts", ".3f"), "accuracy": ("accuracy", ".1%")},
        source=recipe.dataset_name or "stories that recipes/demo_data.py generates",
        defaults={"task_type": "SEQ_CLS", "target_modules": "all-linear"},
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
