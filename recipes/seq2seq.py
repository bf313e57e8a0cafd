"""Sequence to sequence: an encoder-decoder with a sparse adapter, scored by what it writes.

Without arguments it runs offline on a small random T5: numbers in words become digits.

    python recipes/seq2seq.py
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field

import common
import datasets
import demo_data
import evaluate
import numpy as np
from evaluation import METRIC
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)


@dataclass
class RecipeArguments(common.DataArguments):
    """What to turn into what."""

    source_column: str = field(default="source", metadata={"help": "Column of the text to read."})
    target_column: str = field(default="target", metadata={"help": "Column of the text to write."})
    prefix: str = field(default="", metadata={"help": "Put before every text to read, as T5 wants it."})
    max_source_length: int = field(default=512, metadata={"help": "Longest text to read in tokens; the end is cut."})
    max_target_length: int = field(default=128, metadata={"help": "Longest text to write in tokens."})


def load_texts(recipe: RecipeArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test rows."""
    if recipe.dataset_name:
        return common.load_splits(recipe, seed)
    rng, count = random.Random(seed), (recipe.train_examples or 1000) + recipe.test_examples
    drawn = [[rng.randrange(len(demo_data.WORDS)) for _ in range(2)] for _ in range(count)]
    texts = {
        recipe.source_column: [" ".join(demo_data.WORDS[n] for n in numbers) for numbers in drawn],
        recipe.target_column: [" ".join(map(str, numbers)) for numbers in drawn],
    }
    rows = datasets.Dataset.from_dict(texts)
    return rows.select(range(count - recipe.test_examples)), rows.select(range(count - recipe.test_examples, count))


def small_t5(args: Seq2SeqTrainingArguments) -> str:
    """An encoder-decoder with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(common.DEMO_BASE)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return common.small_base(args, T5ForConditionalGeneration, config, tokenizer)


def main(argv: list[str]) -> common.Figures:
    """Train and measure; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, Seq2SeqTrainingArguments)
    args.predict_with_generate, args.generation_max_length = True, recipe.max_target_length
    name = recipe.model_name_or_path or small_t5(args)
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = common.load_base(AutoModelForSeq2SeqLM, name, recipe, args)
    train, test = load_texts(recipe, args.seed)

    def encode(row):
        read = tokenizer(
            recipe.prefix + row[recipe.source_column], truncation=True, max_length=recipe.max_source_length,
            return_token_type_ids=False,
        )  # fmt: skip
        written = tokenizer(row[recipe.target_column], add_special_tokens=False, truncation=True,
                            max_length=recipe.max_target_length - 1)  # fmt: skip
        return {**read, "labels": [*written.input_ids, tokenizer.eos_token_id]}

    def score(predicted) -> common.Figures:
        texts = []
        for ids in (predicted.predictions, predicted.label_ids):
            texts.append(
                tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            )
        return evaluate.load(str(METRIC)).compute(predictions=texts[0], references=texts[1])

    rows = [part.map(encode, remove_columns=part.column_names) for part in (train, test)]
    return common.fine_tune(
        __file__, recipe, args, base,
        data={
            "train_dataset": rows[0], "eval_dataset": rows[1], "compute_metrics": score,
            "data_collator": DataCollatorForSeq2Seq(tokenizer, base),
        },
        measure=lambda trainer: common.evaluated(trainer, "loss", "exact_match"),
        shown={"loss": ("loss of held-out texts", ".3f"), "exact_match": ("written to the letter, %", ".1f")},
        source=recipe.dataset_name or "numbers in words and digits, drawn by recipes/seq2seq.py",
        defaults={"task_type": "SEQ_2_SEQ_LM", "target_modules": "all-linear"},
        trainer_class=Seq2SeqTrainer,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
