"""LoRAM: prune the base, train a LoRA on what is left, and give it back to the full base (Zhang et al., 2025).

Without arguments it runs offline on the demo base beside it, in a few minutes on two CPU cores:

    python recipes/loram.py

The base loses heads and channels for good (`prune: structured`), is aligned with its old self by a few steps on plain
text, and trains a LoRA; `recover_adapter` scatters that into zeros, and the adapter that is left loads on the full base
with peft alone. `prune: masked` sets weights to 0 where they are instead, and recovery changes nothing. With
`load_in_4bit` what is left of the base is quantised while it trains (QLoRAM).
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import common
import demo_data
import torch
from datasets import Dataset
from evaluation import exact_match, text_loss
from peft import LoraConfig, PeftModel, get_peft_model
from reporting import print_table
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_sparse_peft.pruning import load_sliced, prune_model, recover_adapter, save_kept_units, save_sliced, slice_model


@dataclass
class RecipeArguments(common.DataArguments):
    """What to prune and train."""

    prune: Literal["structured", "masked"] = field(
        default="structured", metadata={"help": "Whether units are cut out, or weights set to 0 where they are."}
    )
    pruning_method: str = field(default="wanda", metadata={"help": "What of `prune_model` scores weights and units."})
    patterns: list[str] = field(
        default_factory=lambda: ["rows"], metadata={"help": "Units that are cut: rows (channels), heads."}
    )
    sparsity: float = field(default=0.5, metadata={"help": "Fraction of each block's units, or of the weights."})
    calibration_rows: int = field(default=32, metadata={"help": "Rows of 128 tokens to score weights with."})
    text_dataset: str = field(default="", metadata={"help": "Plain text in a column `text`; empty: the demo's."})
    documents: int = field(default=4000, metadata={"help": "Documents to calibrate and to align with."})
    alignment_steps: int = field(default=0, metadata={"help": "Steps in which all weights that are left train."})
    alignment_rate: float = field(default=5e-5, metadata={"help": "Their learning rate."})
    held_out_rows: int = field(default=32, metadata={"help": "Rows of text to measure on."})
    missing: Literal["zeros", "normal"] = field(
        default="zeros", metadata={"help": "What recovery puts into columns that were cut: zeroA, or normA."}
    )


def load_text(recipe: RecipeArguments, tokenizer, seed: int) -> Dataset:
    """Rows of 128 tokens of plain text."""
    if recipe.text_dataset:
        text = common.datasets.load_dataset(recipe.text_dataset, split="train").shuffle(seed=seed)
        text = common.head(text, recipe.documents)
    else:
        text = demo_data.pretraining_text(recipe.documents, seed=seed)
    return demo_data.chunk_text(text, tokenizer).select_columns(["input_ids"])


def load_pairs(recipe: RecipeArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and test pairs with columns `prompt` and `answer`."""
    if recipe.dataset_name:
        return common.load_splits(recipe, seed)
    train = demo_data.word_problems(recipe.train_examples or 3000, seed=seed, split="train")
    return train, demo_data.word_problems(recipe.test_examples, seed=seed, split="test")


def prune(model: nn.Module, recipe: RecipeArguments, text: Dataset) -> nn.Module:
    """The smaller model, or the one with zeros."""
    rows = text.select(range(min(recipe.calibration_rows, len(text)))).with_format("torch")
    structured = recipe.prune == "structured"
    options = {"pattern": recipe.patterns} if structured else {}
    data = DataLoader(rows, batch_size=16, collate_fn=default_data_collator)
    report = prune_model(model, data, method=recipe.pruning_method, sparsity=recipe.sparsity, **options)
    print(report.table())
    return slice_model(model, report.kept) if structured else model


def align(model: nn.Module, recipe: RecipeArguments, args: TrainingArguments, text: Dataset) -> None:
    """Let all weights learn plain text for a little; none of this reaches the full base."""
    own = copy.copy(args)
    own.output_dir, own.max_steps = str(Path(args.output_dir) / "alignment"), recipe.alignment_steps
    own.learning_rate, own.weight_decay = recipe.alignment_rate, 0.0
    rows = text.map(lambda row: {"labels": row["input_ids"]})
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.ndim == 2} if recipe.prune == "masked" else {}
    Trainer(model=model, args=own, train_dataset=rows, data_collator=default_data_collator).train()
    with torch.no_grad():
        for name, gone in zeros.items():
            model.get_parameter(name).masked_fill_(gone, 0)


def as_trained(model: nn.Module, recipe: RecipeArguments, args: TrainingArguments, folder: Path) -> nn.Module:
    """What is left, as it is saved and loaded: in NF4 if asked for."""
    options = common.base_options(recipe, args)
    if recipe.prune == "structured":
        return common.prepared(load_sliced(save_sliced(model, folder), **options), recipe, args)
    model.save_pretrained(folder)
    return common.load_base(AutoModelForCausalLM, str(folder), recipe, args)


def main(argv: list[str]) -> common.Figures:
    """Prune, align, train, recover, measure each; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    name, output = recipe.model_name_or_path or common.DEMO_BASE, Path(args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, test = load_pairs(recipe, args.seed)
    text = load_text(recipe, tokenizer, args.seed)
    held_out = text
    if not recipe.text_dataset:
        held_out = demo_data.chunk_text(demo_data.pretraining_text(200, seed=0, split="heldout"), tokenizer)
    held_out = common.head(held_out, recipe.held_out_rows)
    figures: common.Figures = {}

    def measure(stage: str, model: nn.Module) -> None:
        figures[f"{stage}_exact_match"] = exact_match(model, tokenizer, test, args.per_device_eval_batch_size)
        figures[f"{stage}_text_loss"] = text_loss(model, held_out)
        figures[f"{stage}_numbers"] = model.num_parameters()

    full = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(args.device)
    measure("full", full)
    small = prune(full, recipe, text)
    figures["pruned_text_loss"] = text_loss(small, held_out)
    if recipe.alignment_steps:
        align(small, recipe, args, text)
    small = as_trained(small.to(torch.bfloat16 if args.bf16 else torch.float32), recipe, args, output / "small")
    measure("small", small)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **recipe.adapter}
    model = get_peft_model(small, LoraConfig(**options))
    data = {
        "train_dataset": demo_data.tokenize_pairs(train, tokenizer),
        "data_collator": DataCollatorForSeq2Seq(tokenizer),
    }
    trainer = Trainer(model=model, args=args, **data)
    figures["train_loss"] = trainer.train().training_loss
    measure("trained", trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    model.save_pretrained(output / "small_adapter")
    if recipe.prune == "structured":
        save_kept_units(model, output / "small_adapter")
    recover_adapter(output / "small_adapter", output / "adapter", name, missing=recipe.missing, seed=args.seed)

    full = AutoModelForCausalLM.from_pretrained(name, **({"dtype": torch.bfloat16} if args.bf16 else {})).to(
        args.device
    )
    measure("recovered", PeftModel.from_pretrained(full, str(output / "adapter")))
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    names = {"full": "full base", "small": "pruned", "trained": "pruned, with its LoRA", "recovered": "full, with that"}
    rows = [(n, f"{figures[f'{at}_text_loss']:.3f}", f"{figures[f'{at}_exact_match']:.1f}") for at, n in names.items()]
    share = figures["small_numbers"] / figures["full_numbers"]
    print_table(rows, f"LoRAM, trained on {share:.0%} of the numbers", ("loss on text", "exact match, %"))
    print(f"adapter for the full base: {output / 'adapter'}")
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
