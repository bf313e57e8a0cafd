"""Runs that a YAML file describes: causal language models on text, or on prompts and answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..training import RunReportCallback
from ..training.recipe_files import parse_recipe
from .base import load_base
from .data import chunk_text, head, in_chat_template, load_splits, tokenize_pairs, tokenize_texts
from .measures import exact_match, generated_answers, mean_loss
from .method import choose_method
from .options import TextArguments
from .run import Figures, FineTuned, fine_tune

_DEFAULTS = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}


def read_options(words: Sequence[str]) -> tuple[TextArguments, TrainingArguments]:
    """The options of a run from a YAML file, if the first word names one, and overrides `key=value` or `--key value`.

    Types are checked as annotated; numbers are YAML 1.2's, so that `1e-2` is one.

    Raises:
        ValueError: an unknown option, with those that are alike; a value of another type; no base model. Names the
            file and the option.
    """
    # transformers asks to be told when bf16 has no GPU to run on.
    below = {"use_cpu": not torch.cuda.is_available(), "report_to": "none"}
    try:
        options, args = parse_recipe((TextArguments, TrainingArguments), words, below=below)
    except ValueError as error:
        script = _script_of(words[0]) if words and "there is no option" in str(error) else None
        if script is None:
            raise
        raise ValueError(f"{error} The file's own command is: {script}") from error
    if not options.model_name_or_path:
        raise ValueError("model_name_or_path is empty; name the base model, a Hub id or a folder.")
    return options, args


def train_recipe(words: Sequence[str]) -> FineTuned:
    """Train what a YAML file and overrides describe (`read_options`): a causal language model's adapter, on prompts
    and answers with the loss on the answer, or on texts.

    Measured before and after, on held-out rows: the loss in nats a token (`test_loss`), for prompts and answers exact
    match of greedy answers in percent (`exact_match`), and with `forgetting_dataset` the loss on text that the task
    has nothing to do with (`held_out_loss`). What the run leaves is `fine_tune`'s.

    Raises:
        ValueError: an option, a method or data that cannot be used; everything but the data is checked before the base
            is loaded.
    """
    options, args = read_options(words)
    set_seed(args.seed)
    method = choose_method(options, _DEFAULTS, args.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, test = load_splits(options, args.seed)
    if options.chat_template and not options.text_column:
        train, test = (in_chat_template(pairs, tokenizer) for pairs in (train, test))
    tokenize = tokenize_texts if options.text_column else tokenize_pairs
    rows = [tokenize(part, tokenizer, options.max_length) for part in (train, test)]
    held_out = _held_out_text(options, tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer)

    def measure(trainer: Trainer) -> Figures:
        model, size = trainer.model, args.per_device_eval_batch_size
        found = {"test_loss": mean_loss(model, rows[1], collator, size)}
        if not options.text_column and options.max_new_tokens:
            answers = generated_answers(model, tokenizer, test["prompt"], size, options.max_new_tokens)
            found["exact_match"] = exact_match(answers, test["answer"], options.answer_format)
        if held_out is not None:
            found["held_out_loss"] = mean_loss(model, held_out, collator, size)
        return found

    dense = replace(options, load_in_4bit=False)
    return fine_tune(
        method,
        load_base(AutoModelForCausalLM, options.model_name_or_path, options, args),
        args,
        data={"train_dataset": rows[0], "data_collator": collator},
        measure=measure,
        load_dense=lambda: load_base(AutoModelForCausalLM, options.model_name_or_path, dense, args),
        card={"training_data": [options.dataset_name] if options.dataset_name else _named(options.data_files)},
        report=RunReportCallback(max(1, int(args.logging_steps))) if importlib.util.find_spec("matplotlib") else None,
    )


def _held_out_text(options: TextArguments, tokenizer: Any) -> Dataset | None:
    if not options.forgetting_dataset:
        return None
    text = datasets.load_dataset(options.forgetting_dataset, options.forgetting_config, split=options.forgetting_split)
    text = text.filter(lambda row: bool(row["text"].strip()))
    return head(chunk_text(text, tokenizer, options.forgetting_length), options.forgetting_rows)


def _named(files: list[str]) -> str:
    return "the files " + ", ".join(Path(file).name for file in files)


def _script_of(word: str) -> str | None:
    """The command of a script that a recipe's head names."""
    path = Path(word)
    if not path.is_file():
        return None
    heads = [line for line in path.read_text(encoding="utf-8").splitlines()[:5] if line.startswith("#   python ")]
    return heads[0].removeprefix("#   ") if heads else None
