"""Tiny stand-ins of the models and data sets that shipped YAMLs name, of their shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

RECIPES = Path(__file__).parents[2] / "recipes"
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = ("a", "train", "leaves", "the", "station", "at", "noon", "so", "how", "many", "cars", "are", "there")


def sentence(seed: int, words: int = 12) -> str:
    return " ".join(WORDS[(seed * 7 + 3 * at * (seed + 1)) % len(WORDS)] for at in range(words))


@dataclass(frozen=True)
class Shape:
    """Configurations, splits and rows of a data set."""

    row: Callable[[int], dict[str, Any]]
    configs: Sequence[str] = ("default",)
    splits: Sequence[str] = ("train", "test")
    features: dict[str, Any] = field(default_factory=dict)


DATASETS = {
    "openai/gsm8k": Shape(
        lambda i: {
            "question": f"{sentence(i)}, {i} and {i + 1}?",
            "answer": f"{i} + {i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}",
        },
        configs=("main", "socratic"),
    ),
    "Salesforce/wikitext": Shape(
        lambda i: {"text": "" if i % 3 == 0 else f" = {sentence(i)} = \n" if i % 3 == 1 else sentence(i, 200)},
        configs=("wikitext-2-raw-v1", "wikitext-2-v1", "wikitext-103-raw-v1", "wikitext-103-v1"),
        splits=("train", "validation", "test"),
    ),
}
ROWS = 40


def load_dataset(path: str, name: str | None = None, *, split: str) -> datasets.Dataset:
    """`datasets.load_dataset` for `DATASETS`, which refuses what the real one refuses."""
    shape = DATASETS[path]
    if name is None and len(shape.configs) > 1:
        raise ValueError(f"Config name is missing. Please pick one among the available configs: {list(shape.configs)}")
    if name is not None and name not in shape.configs:
        raise ValueError(f"BuilderConfig '{name}' not found. Available: {list(shape.configs)}")
    if split not in shape.splits:
        raise ValueError(f'Unknown split "{split}". Should be one of {list(shape.splits)}.')
    rows = datasets.Dataset.from_list([shape.row(i) for i in range(ROWS)])
    for column, feature in shape.features.items():
        rows = rows.cast_column(column, feature)
    return rows


def llama(folder: Path, chat: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "demo_base")
    tokenizer.model_max_length = 131072
    if chat:
        tokenizer.chat_template = CHAT
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)


Model = Callable[[Path], None]
"""Writes a model and its tokenizer into a folder."""
MODELS: dict[str, Model] = {"meta-llama/Llama-3.2-1B-Instruct": partial(llama, chat=True)}
