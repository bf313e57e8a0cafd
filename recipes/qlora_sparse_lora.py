"""QLoRA-style fine-tuning with SparseLora: a 4-bit base, a support that moves and ranks that move.

Without arguments it runs offline on the demo base beside it, in a few minutes on two CPU cores:

    python recipes/qlora_sparse_lora.py

With a YAML file, and options that override it, it is an ordinary fine-tuning script for prompts and answers:

    python recipes/qlora_sparse_lora.py recipes/qlora_sparse_lora_llama1b.yaml --learning_rate 1e-4

Any method of the package takes the adapter's place, in YAML (`recipes/methods/` has one of each family) or as

    python recipes/qlora_sparse_lora.py --method spiel-ag method_options.density=0.02
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import Literal

import common
import datasets
import demo_data
from datasets import Dataset
from evaluation import exact_match, text_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


@dataclass
class RecipeArguments(common.DataArguments):
    """What to fine-tune on what."""

    prompt_column: str = field(default="prompt", metadata={"help": "Column with the text before the answer."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the text to learn."})
    chat_template: bool = field(default=False, metadata={"help": "Put prompts into the model's chat template."})
    max_length: int = field(default=0, metadata={"help": "Longest prompt and answer in tokens; 0: no limit."})
    max_new_tokens: int = field(default=8, metadata={"help": "Longest answer to generate in the evaluation."})
    answer_format: Literal["text", "final_number"] = field(
        default="text", metadata={"help": "What of answers is compared: all, or the number they end with."}
    )
    forgetting_dataset: str = field(
        default="", metadata={"help": "Text whose loss says what was forgotten; empty: the demo's, on the demo's data."}
    )
    forgetting_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    forgetting_split: str = field(default="test", metadata={"help": "Its split; the column is `text`."})
    forgetting_rows: int = field(default=64, metadata={"help": "Rows to read of it, each of `forgetting_length`."})
    forgetting_length: int = field(default=128, metadata={"help": "Tokens of a row."})


def load_base(recipe: common.RecipeArguments, args: TrainingArguments):
    """Tokenizer and base model, quantised and prepared for training."""
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer, common.load_base(AutoModelForCausalLM, name, recipe, args)


def load_pairs(recipe: RecipeArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and test pairs with columns `prompt` and `answer`."""
    if not recipe.dataset_name:
        train = demo_data.word_problems(recipe.train_examples or 3000, seed=seed, split="train")
        return train, demo_data.word_problems(recipe.test_examples, seed=seed, split="test")
    columns = {recipe.prompt_column: "prompt", recipe.answer_column: "answer"}
    return tuple(
        rows.select_columns(list(columns)).rename_columns(columns) for rows in common.load_splits(recipe, seed)
    )


def load_text(recipe: RecipeArguments, tokenizer) -> Dataset | None:
    """Rows of tokens of text that the task has nothing to do with."""
    if recipe.forgetting_dataset:
        text = datasets.load_dataset(recipe.forgetting_dataset, recipe.forgetting_config, split=recipe.forgetting_split)
        text = text.filter(lambda row: bool(row["text"].strip()))
    elif not recipe.dataset_name:
        text = demo_data.pretraining_text(200, seed=0, split="heldout")
    else:
        return None
    rows = demo_data.chunk_text(text, tokenizer, recipe.forgetting_length)
    return common.head(rows, recipe.forgetting_rows)


def main(argv: list[str]) -> common.Figures:
    """Fine-tune, evaluate before and after, write the adapter, its card and the picture; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    tokenizer, base = load_base(recipe, args)
    train, test = load_pairs(recipe, args.seed)
    if recipe.chat_template:
        train, test = (demo_data.in_chat_template(pairs, tokenizer) for pairs in (train, test))
    held_out = load_text(recipe, tokenizer)
    data = {
        "train_dataset": demo_data.tokenize_pairs(train, tokenizer, recipe.max_length),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }

    def measure(trainer: Trainer) -> common.Figures:
        options = {"batch_size": args.per_device_eval_batch_size, "max_new_tokens": recipe.max_new_tokens}
        options["final_number"] = recipe.answer_format == "final_number"
        found = {"exact_match": exact_match(trainer.model, tokenizer, test, **options)}
        if held_out is not None:
            found["held_out_loss"] = text_loss(trainer.model, held_out, args.per_device_eval_batch_size)
        return found

    shown = {"exact_match": ("exact match, %", ".1f")}
    if held_out is not None:
        what = recipe.forgetting_dataset or "held-out pretraining text"
        shown["held_out_loss"] = (f"loss on {what}", ".3f")
    dense = replace(recipe, load_in_4bit=False)
    return common.fine_tune(
        __file__, recipe, args, base, data=data, measure=measure, shown=shown,
        source=recipe.dataset_name or "word problems that recipes/demo_data.py generates",
        defaults={"task_type": "CAUSAL_LM", "target_modules": "all-linear"},
        load_dense=lambda: load_base(dense, args)[1], gradient_share=True,
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
