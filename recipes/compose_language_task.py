"""Language plus task: one adapter learns a language from its text, another one a task in English; their sum does the
task in the language, of which it has seen no example (Ansell et al., 2022).

Without arguments it runs offline on the demo base, which has never read the language's verbs:

    python recipes/compose_language_task.py

Supports add exactly, on their union: the sum is an adapter like its parts, and can be saved and exported as one.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import common
import demo_data
from evaluation import exact_match, text_loss
from peft import get_peft_model
from reporting import print_table
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_sparse_peft.finetuning import method_of_card

FOREIGN = {
    "buys": "zuba", "finds": "lofi", "gets": "mipa", "wins": "tuka", "more": "gure",
    "loses": "wedo", "sells": "nuso", "drops": "vami", "gives": "hoba", "away": "fire",
}  # fmt: skip
"""The language: English, but for the words that tell a gain from a loss."""


@dataclass
class RecipeArguments(common.RecipeArguments):
    """What to train in turn."""

    language_steps: int = field(default=40, metadata={"help": "Steps on the text; `max_steps` on the task."})
    documents: int = field(default=1000, metadata={"help": "Documents of the language."})


def translated(text: str) -> str:
    """`text` in the language."""
    return " ".join(FOREIGN.get(word, word) for word in text.split(" "))


def main(argv: list[str]) -> common.Figures:
    """Train both, add them, measure the task in the language; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    name = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(name)
    base = common.load_base(AutoModelForCausalLM, name, recipe, args)
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    methods = {
        part: common.choose_method(recipe, defaults, args.seed + i) for i, part in enumerate(("language", "task"))
    }
    model = get_peft_model(base, methods["language"].config, adapter_name="language")
    text = demo_data.pretraining_text(recipe.documents, seed=args.seed)
    foreign = text.map(lambda row: {"text": translated(row["text"])})
    held_out = demo_data.pretraining_text(100, seed=0, split="heldout").map(
        lambda row: {"text": translated(row["text"])}
    )
    held_out = demo_data.chunk_text(held_out, tokenizer)
    train = demo_data.word_problems(recipe.train_examples or 1000, args.seed, "train")
    english = demo_data.word_problems(recipe.test_examples, args.seed, "test")
    test = english.map(lambda row: {"prompt": translated(row["prompt"])})
    rows = {"language": demo_data.chunk_text(foreign, tokenizer), "task": demo_data.tokenize_pairs(train, tokenizer)}
    figures = {}
    for part, method in methods.items():
        if part not in model.peft_config:
            model.add_adapter(part, method.config)
        model.set_adapter(part)
        own = copy.copy(args)
        own.output_dir = str(Path(args.output_dir) / f"{part}_run")
        own.max_steps = recipe.language_steps if part == "language" else args.max_steps
        data = {"train_dataset": rows[part], "data_collator": DataCollatorForSeq2Seq(tokenizer)}
        trainer: Trainer = common.make_trainer(method, model, own, data)
        figures[f"{part}_train_loss"] = trainer.train().training_loss
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.add_weighted_adapter(["language", "task"], [1.0, 1.0], "both", combination_type="cat")
    for part in ("language", "task", "both"):
        model.set_adapter(part)
        figures[f"{part}_exact_match"] = exact_match(model, tokenizer, test)
        figures[f"{part}_english"] = exact_match(model, tokenizer, english)
        figures[f"{part}_text"] = text_loss(model, held_out)
    with model.disable_adapter():
        figures["base_text"] = text_loss(model, held_out)
    figures["train_loss"] = figures["task_train_loss"]
    output = Path(args.output_dir)
    card = {
        **method_of_card(methods["task"]), "metrics": {key: round(value, 4) for key, value in figures.items()},
        "training_data": "text and word problems that recipes/demo_data.py generates, the text translated",
        "notes": "The sum of a language's adapter and a task's, by recipes/compose_language_task.py.",
    }  # fmt: skip
    common.save_adapter(model, output / "adapter", adapter_name="both", **card)
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    table = [
        (f"{label}, {part}", "", f"{figures[f'{part}_{key}']:{form}}")
        for key, label, form in (
            ("exact_match", "task in the language, exact match, %", ".1f"), ("english", "task in English", ".1f"),
            ("text", "loss on the language's text", ".3f"),
        )
        for part in ("language", "task", "both")
    ]  # fmt: skip
    print_table(table, title="language + task")
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
