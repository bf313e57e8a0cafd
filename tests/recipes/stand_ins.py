"""Tiny stand-ins of the models and data sets that shipped YAMLs name, of their shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

RECIPES = Path(__file__).parents[2] / "recipes"
CHAT = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %} {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = ("a", "train", "leaves", "the", "station", "at", "noon", "so", "how", "many", "cars", "are", "there")


def sentence(seed: int, words: int = 12) -> str:
    return " ".join(WORDS[(seed * 7 + 3 * at * (seed + 1)) % len(WORDS)] for at in range(words))


def turns(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": sentence(i)}, {"role": "assistant", "content": sentence(i + 3, 6)}]


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
    "meta-math/MetaMathQA": Shape(
        lambda i: {"type": "GSM_Rephrased", "query": f"{sentence(i)}?", "response": f"so the answer is: {i}"},
        splits=("train",),
    ),
    "zwhe99/commonsense_170k": Shape(
        lambda i: {"instruction": f"{sentence(i)} {i}, true or false?", "input": "", "output": f"it is {i % 2 == 0}"},
        splits=("train",),
    ),
    "Salesforce/wikitext": Shape(
        lambda i: {"text": "" if i % 3 == 0 else f" = {sentence(i)} = \n" if i % 3 == 1 else sentence(i, 200)},
        configs=("wikitext-2-raw-v1", "wikitext-2-v1", "wikitext-103-raw-v1", "wikitext-103-v1"),
        splits=("train", "validation", "test"),
    ),
    "trl-lib/Capybara": Shape(
        lambda i: {"source": "capybara", "messages": turns(i), "num_turns": 1},
    ),
    "trl-lib/ultrafeedback_binarized": Shape(
        lambda i: {
            "chosen": turns(i),
            "rejected": turns(i)[:1] + turns(i + 1)[1:],
            "score_chosen": 8.0,
            "score_rejected": 4.0,
        },
    ),
    "nyu-mll/glue": Shape(
        lambda i: {"sentence1": sentence(i), "sentence2": sentence(i + i % 2), "label": 1 - i % 2, "idx": i},
        configs=("ax", "cola", "mrpc", "sst2"),
        splits=("train", "validation", "test"),
        features={"label": datasets.ClassLabel(names=["not_equivalent", "equivalent"])},
    ),
    "unimelb-nlp/wikiann": Shape(
        lambda i: {"tokens": sentence(i).split(), "ner_tags": [(i + at) % 7 for at in range(12)]},
        configs=("de", "en", "hi"),
        splits=("train", "validation", "test"),
        features={
            "ner_tags": datasets.List(
                datasets.ClassLabel(names=["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"])
            )
        },
    ),
    "abisee/cnn_dailymail": Shape(
        lambda i: {"article": sentence(i, 60), "highlights": sentence(i, 8), "id": str(i)},
        configs=("1.0.0", "2.0.0", "3.0.0"),
        splits=("train", "validation", "test"),
    ),
    "ethz/food101": Shape(
        lambda i: {"image": Image.new("RGB", (40 + i, 50), (5 * i, 90, 30)), "label": i % 101},
        splits=("train", "validation"),
        features={"label": datasets.ClassLabel(names=[str(i) for i in range(101)])},
    ),
    "PolyAI/minds14": Shape(  # without what decodes files: sound as it is after that
        lambda i: {
            "audio": {"array": [math.sin(0.01 * i * at) for at in range(4000)], "sampling_rate": 16000},
            "transcription": sentence(i, 4),
            "english_transcription": sentence(i, 4),
            "intent_class": i % 14,
        },
        configs=("de-DE", "en-AU", "en-US"),
        splits=("train",),
    ),
    "sentence-transformers/all-nli": Shape(
        lambda i: {"anchor": sentence(i), "positive": sentence(i, 6)},
        configs=("pair", "pair-class", "pair-score", "triplet"),
        splits=("train", "dev", "test"),
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


def llama(folder: Path, chat: bool, pruned: bool = False) -> None:
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "demo_base")
    tokenizer.model_max_length = 131072
    if chat:
        tokenizer.chat_template = CHAT
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if pruned:  # two of four weights
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.data.view(-1, 4)[:, :2] = 0
    saved(folder, model, tokenizer)


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved(folder: Path, model, processor=None) -> None:
    (processor or AutoTokenizer.from_pretrained(RECIPES / "demo_base")).save_pretrained(folder)
    model.save_pretrained(folder)


def encoder(folder: Path, config_class, model_class) -> None:
    saved(folder, model_class(config_class(**SMALL, vocab_size=640, max_position_embeddings=300, pad_token_id=0)))


def t5(folder: Path) -> None:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    ids = {"vocab_size": 640, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    saved(folder, T5ForConditionalGeneration(T5Config(**sizes, **ids, feed_forward_proj="gated-gelu")))


def vit(folder: Path) -> None:
    config = ViTConfig(**SMALL, image_size=32, patch_size=8)
    saved(folder, ViTModel(config), ViTImageProcessorPil(size={"height": 32, "width": 32}))


def whisper(folder: Path) -> None:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 50, **heads}
    ids = {"vocab_size": 640, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**sizes, **ids, suppress_tokens=[], begin_suppress_tokens=[])
    saved(folder, WhisperForConditionalGeneration(config))
    WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(folder)


Model = Callable[[Path], None]
"""Writes a model and its tokenizer or processor into a folder."""
MODELS: dict[str, Model] = {
    "meta-llama/Llama-3.2-1B-Instruct": partial(llama, chat=True),
    "meta-llama/Llama-3.2-1B": partial(llama, chat=False),
    "RedHatAI/Sparse-Llama-3.1-8B-2of4": partial(llama, chat=False, pruned=True),
    "FacebookAI/xlm-roberta-base": partial(encoder, config_class=XLMRobertaConfig, model_class=XLMRobertaForMaskedLM),
    "sentence-transformers/all-MiniLM-L6-v2": partial(encoder, config_class=BertConfig, model_class=BertModel),
    "google/flan-t5-base": t5,
    "google/vit-base-patch16-224-in21k": vit,
    "openai/whisper-small": whisper,
}
