"""Transcription of speech: Whisper with a sparse adapter in encoder and decoder.

Without arguments it runs offline on a small random Whisper: each digit is a tone.

    python recipes/speech.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import common
import datasets
import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

RATE = 16000
"""Samples a second, as Whisper wants them."""
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""The linears of a transformer layer; convolutions before the encoder stay as they are."""


@dataclass
class RecipeArguments(common.DataArguments):
    """What to transcribe."""

    audio_column: str = field(default="audio", metadata={"help": "Column of the sound."})
    text_column: str = field(default="transcription", metadata={"help": "Column of what is said."})
    max_target_length: int = field(default=128, metadata={"help": "Longest transcription in tokens; the end is cut."})


def load_speech(recipe: RecipeArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Training and test rows, sound as `{"array", "sampling_rate"}`."""
    if recipe.dataset_name:
        train, test = common.load_splits(recipe, seed)
        if not isinstance(train.features[recipe.audio_column], datasets.Audio):
            return train, test
        sound = datasets.Audio(sampling_rate=RATE)  # whatever rate the files have
        return train.cast_column(recipe.audio_column, sound), test.cast_column(recipe.audio_column, sound)
    rng, count = np.random.default_rng(seed), (recipe.train_examples or 256) + recipe.test_examples
    digits, time = rng.integers(10, size=(count, 2)), np.arange(RATE // 2) / RATE
    sounds = [np.concatenate([np.sin(2 * np.pi * (300 + 200 * d) * time) for d in pair]) for pair in digits]
    sounds = [{"array": (s + 0.1 * rng.standard_normal(s.size)).tolist(), "sampling_rate": RATE} for s in sounds]
    texts = [" ".join(map(str, pair)) for pair in digits]
    rows = datasets.Dataset.from_dict({recipe.audio_column: sounds, recipe.text_column: texts})
    return rows.select(range(count - recipe.test_examples)), rows.select(range(count - recipe.test_examples, count))


def small_whisper(args: TrainingArguments) -> str:
    """A Whisper that hears one second, with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(common.DEMO_BASE)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_source_positions=50,
        max_target_positions=32, bos_token_id=tokenizer.bos_token_id, decoder_start_token_id=tokenizer.bos_token_id,
        suppress_tokens=[], begin_suppress_tokens=[], **ends,
    )  # fmt: skip
    hears = WhisperFeatureExtractor(feature_size=80, sampling_rate=RATE, chunk_length=1)
    return common.small_base(args, WhisperForConditionalGeneration, config, tokenizer, hears)


def collator(recipe: RecipeArguments, tokenizer: Any, extractor: Any, base: torch.nn.Module) -> Callable:
    """Makes batches of rows: log-mel features of the model's full length, labels that end and are padded by -100."""

    def collate(rows):
        sounds = [np.asarray(row[recipe.audio_column]["array"], dtype=np.float32) for row in rows]
        texts = tokenizer(
            [row[recipe.text_column] for row in rows], truncation=True, max_length=recipe.max_target_length - 1
        )
        ended = [
            ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id] for ids in texts.input_ids
        ]
        # The model puts its start token before the labels itself.
        ended = [ids[1:] if ids[0] == base.config.decoder_start_token_id else ids for ids in ended]
        longest = max(map(len, ended))
        return {
            "input_features": extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features.to(base.dtype),
            "labels": torch.tensor([ids + [-100] * (longest - len(ids)) for ids in ended]),
        }

    return collate


def main(argv: list[str]) -> common.Figures:
    """Train and measure; returns the figures."""
    recipe, args = common.begin(__file__, argv, RecipeArguments, TrainingArguments)
    args.remove_unused_columns, args.label_names = False, ["labels"]
    name = recipe.model_name_or_path or small_whisper(args)
    tokenizer, extractor = AutoTokenizer.from_pretrained(name), AutoFeatureExtractor.from_pretrained(name)
    base = common.load_base(AutoModelForSpeechSeq2Seq, name, recipe, args)
    train, test = load_speech(recipe, args.seed)

    def tokens_right(predicted) -> common.Figures:
        known = predicted.label_ids >= 0
        return {"token_accuracy": float((predicted.predictions == predicted.label_ids)[known].mean())}

    return common.fine_tune(
        __file__, recipe, args, base,
        data={
            "train_dataset": train, "eval_dataset": test, "compute_metrics": tokens_right,
            "data_collator": collator(recipe, tokenizer, extractor, base),
            "preprocess_logits_for_metrics": lambda logits, _: logits[0].argmax(-1),
        },
        measure=lambda trainer: common.evaluated(trainer, "loss", "token_accuracy"),
        shown={
            "loss": ("loss of held-out transcriptions", ".3f"),
            "token_accuracy": ("their tokens predicted right", ".1%"),
        },
        source=recipe.dataset_name or "tones for digits, drawn by recipes/speech.py",
        defaults={"target_modules": TARGETS},
    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
