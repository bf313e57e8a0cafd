"""The options of a run, beside those of `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..utils.option_types import NonNegativeInt, PositiveInt


@dataclass
class AdapterArguments:
    """What is trained, on how much."""

    model_name_or_path: str = field(default="", metadata={"help": "Base model: a Hub id or a folder."})
    load_in_4bit: bool = field(default=True, metadata={"help": "NF4 with double quantisation; False: a dense base."})
    adapter: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of SparseLoraConfig."})
    method: str = field(
        default="", metadata={"help": "Method in place of `adapter`: `sparse-peft methods` lists them."}
    )
    method_options: dict[str, Any] = field(default_factory=dict, metadata={"help": "Options of the method."})
    train_examples: NonNegativeInt = field(default=0, metadata={"help": "Examples to train on; 0: all."})
    test_examples: NonNegativeInt = field(default=200, metadata={"help": "Examples to measure on; 0: all."})


@dataclass
class TextArguments(AdapterArguments):
    """And on which text."""

    dataset_name: str = field(default="", metadata={"help": "Data set: a Hub id or a folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, where it has several."})
    data_files: list[str] = field(
        default_factory=list, metadata={"help": "Files of rows in place of a data set: .json, .jsonl, .csv, .parquet."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str = field(default="", metadata={"help": "Split to measure on; empty: a part of `train_split`."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the text before the answer."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the text to learn."})
    text_column: str = field(
        default="", metadata={"help": "Column of whole texts to learn, in place of prompts and answers."}
    )
    chat_template: bool = field(default=False, metadata={"help": "Put prompts into the model's chat template."})
    max_length: NonNegativeInt = field(default=0, metadata={"help": "Longest row in tokens; 0: no limit."})
    max_new_tokens: NonNegativeInt = field(
        default=8, metadata={"help": "Longest answer to generate for exact match; 0: none is."}
    )
    answer_format: Literal["text", "final_number"] = field(
        default="text", metadata={"help": "What of answers is compared: all, or the number they end with."}
    )
    forgetting_dataset: str = field(default="", metadata={"help": "Text whose loss says what was forgotten."})
    forgetting_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    forgetting_split: str = field(default="test", metadata={"help": "Its split; the column is `text`."})
    forgetting_rows: NonNegativeInt = field(
        default=64, metadata={"help": "Rows to read of it, each of `forgetting_length`; 0: all."}
    )
    forgetting_length: PositiveInt = field(default=128, metadata={"help": "Tokens of a row."})
