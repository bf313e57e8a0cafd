"""Rows of text, and the tokens that a run learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from .options import TextArguments

IGNORED = -100
"""Label that the cross-entropy of transformers skips."""
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_splits(options: TextArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Rows to train and to measure on, drawn by seed.

    Raises:
        ValueError: neither a data set nor files are named, or both; files of other or several kinds; columns that are
            not there.
    """
    if bool(options.dataset_name) == bool(options.data_files):
        raise ValueError("Name one of dataset_name (a Hub id or a folder) and data_files (files of rows).")
    source, more = options.dataset_name, {}
    if options.data_files:
        kinds = {_READERS.get(Path(file).suffix) for file in options.data_files}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(f"data_files={options.data_files}: give files of one kind, {', '.join(_READERS)}.")
        missing = [file for file in options.data_files if not Path(file).is_file()]
        if missing:
            raise ValueError(f"data_files: there is no file '{missing[0]}'.")
        source, more = kinds.pop(), {"data_files": options.data_files}

    def load(split: str) -> Dataset:
        return datasets.load_dataset(source, options.dataset_config, split=split, **more).shuffle(seed=seed)

    train = load(options.train_split)
    if options.test_split:
        test = load(options.test_split)
    else:
        parts = train.train_test_split(test_size=options.test_examples or 0.1, seed=seed)
        train, test = parts["train"], parts["test"]
    fields = {"text_column": "text"} if options.text_column else {"prompt_column": "prompt", "answer_column": "answer"}
    for field in fields:
        if getattr(options, field) not in train.column_names:
            known = sorted(train.column_names)
            raise ValueError(f"{field}={getattr(options, field)!r} is no column of the data, which has {known}.")
    names = {getattr(options, field): name for field, name in fields.items()}
    train, test = (rows.select_columns(list(names)).rename_columns(names) for rows in (train, test))
    return head(train, options.train_examples), head(test, options.test_examples)


def head(rows: Dataset, count: int) -> Dataset:
    """The first `count` rows; all for 0 or where there are no more."""
    return rows.select(range(min(count, len(rows)))) if count else rows


def in_chat_template(pairs: Dataset, tokenizer: Any) -> Dataset:
    """`prompt`s as a user's turn in the tokenizer's chat template, up to where the answer begins.

    A start token that the tokenizer puts in front of every text is left out, because `tokenize_pairs` brings it.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"'{tokenizer.name_or_path}' has no chat template. Take a chat model, or chat_template=false.")
    brings_start = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

    def render(row: dict[str, str]) -> dict[str, str]:
        turn = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return {"prompt": text.removeprefix(tokenizer.bos_token) if brings_start else text}

    return pairs.map(render)


def tokenize_pairs(pairs: Dataset, tokenizer: Any, max_length: int = 0) -> Dataset:
    """`prompt`/`answer` -> `input_ids`, `attention_mask`, `labels`: loss on the answer and the end token only.

    Rows of more than `max_length` tokens (0: no limit) lose their end; those that lose their answer are left out.
    Unpadded: pad with `DataCollatorForSeq2Seq(tokenizer)`, which gives the padding of `labels` -100 on the side
    `tokenizer.padding_side` says. For generation, pad `prompt` itself, on the left.

    Raises:
        ValueError: no answer is left.
    """

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["answer"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        end = max_length or len(prompt) + len(answer)
        ids, labels = (prompt + answer)[:end], ([IGNORED] * len(prompt) + answer)[:end]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    rows = pairs.map(encode, remove_columns=pairs.column_names)
    if max_length:
        rows = rows.filter(lambda row: row["labels"][-1] != IGNORED)
        if not len(rows):
            raise ValueError(f"max_length={max_length} cuts the answer off every one of {len(pairs)} rows. Raise it.")
    return rows


def tokenize_texts(texts: Dataset, tokenizer: Any, max_length: int = 0) -> Dataset:
    """`text` -> `input_ids`, `attention_mask`, `labels`: loss on every token and the end token; rows of more than
    `max_length` tokens (0: no limit) lose their end."""

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        ids = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
        ids = ids[: max_length or len(ids)]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)}

    return texts.map(encode, remove_columns=texts.column_names)


def chunk_text(text: Dataset, tokenizer: Any, length: int = 128) -> Dataset:
    """Documents, each closed by the end token, joined and cut into rows of exactly `length` tokens (rest dropped).

    Columns `input_ids`, `attention_mask`, `labels`, ready for the causal loss of transformers.

    Raises:
        ValueError: the text has fewer tokens.
    """
    stream: list[int] = []
    for ids in tokenizer(list(text["text"])).input_ids:
        stream += [*ids, tokenizer.eos_token_id]
    rows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not rows:
        raise ValueError(f"length={length} is over the {len(stream)} tokens of the text. Give more text.")
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * len(rows), "labels": rows})
