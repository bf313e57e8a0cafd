"""Classes of words: named entities by an encoder with a sparse adapter and a head that trains whole.

Without arguments it runs offline on a small random encoder: names, places, things and numbers in stories.

    python recipes/token_classification.py
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field

import common
import datasets
import demo_data
import numpy as np
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    TrainingArguments,
)

KINDS = {
    **{name: 1 for names in demo_data.NAMES.values() for name in names},
    **dict.fromkeys(demo_data.PLACES, 2),
    **dict.fromkeys((*demo_data.OBJECTS, *demo_data.THINGS), 3),
}


@dataclass
class RecipeArguments(common.DataArguments):
    """What to tag."""

    words_column: str = field(default="tokens", metadata={"help": "Column of the words, a list."})
    tags_column: str = field(default="ner_tags", metadata={"help": "Column of their classes, numbers from 0 on."})
    max_length: int = field(default=256, metadata={"help": "Longest row in tokens; the end is cut."})


def load_words(recipe: RecipeArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test rows."""
    if recipe.dataset_name:
        return common.load_splits(recipe, seed)
    count, rng = recipe.train_examples or 500, random.Random(seed)
    text = demo_data.pretraining_text(count + recipe.test_examples, seed=rng.randrange(1000))["text"]
    words = [document.split()[:24] for document in text]
    tags = [[4 if word.isdigit() else KINDS.get(word, 0) for word in row] for row in words]
    rows = datasets.Dataset.from_dict({recipe.words_column: words, recipe.tags_column: tags})
    return rows.select(range(count)), rows.select(range(count, len(rows)))


def accuracy(predicted) -> dict[str, float]:
    """Fraction of right tags, of all words and of those that have one."""
    known, labels = predicted.predictions.argmax(-1), predicted.label_ids
    right, words, tagged = known == labels, labels >= 0, labels > 0
    return {"accuracy": float(right[words].mean()), "recall": float(right[tagged].mean())} if np.any(tagged) else {}


def small_encoder(args: TrainingArguments, classes: int) -> str:
    """An encoder with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(common.DEMO_BASE)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, num_labels=classes, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return common.small_base(args, BertForTokenClassification, config, tokenizer)


def main(argv: list[str]) -> common.Figures:
    """Train and measure; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    train, test = load_words(recipe, args.seed)
    classes = common.class_count(train, recipe.tags_column)
    name = recipe.model_name_or_path or small_encoder(args, classes)
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = common.load_base(AutoModelForTokenClassification, name, recipe, args, num_labels=classes)

    def encode(row):
        found = tokenizer(
            row[recipe.words_column], is_split_into_words=True, truncation=True, max_length=recipe.max_length,
            return_token_type_ids=False,
        )  # fmt: skip
        before, labels = None, []
        for word in found.word_ids():  # a word's first token has its tag
            labels.append(demo_data.IGNORED if word is None or word == before else row[recipe.tags_column][word])
            before = word
        return {**found, "labels": labels}

    rows = [part.map(encode, remove_columns=part.column_names) for part in (train, test)]
    return common.fine_tune(
        __file__, recipe, args, base,
        data={
            "train_dataset": rows[0], "eval_dataset": rows[1], "compute_metrics": accuracy,
            "data_collator": DataCollatorForTokenClassification(tokenizer),
        },
        measure=lambda trainer: common.evaluated(trainer, "loss", "accuracy", "recall"),
        shown={
            "loss": ("loss of held-out words", ".3f"), "accuracy": ("right tags", ".1%"),
            "recall": ("right tags of words that have one", ".1%"),
        },
        source=recipe.dataset_name or "stories that recipes/demo_data.py generates",
        defaults={"task_type": "TOKEN_CLS", "target_modules": ["query", "key", "value", "dense"]},
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
