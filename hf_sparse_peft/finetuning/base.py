"""The base model of a run."""

from __future__ import annotations

from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from .options import AdapterArguments


def nf4() -> BitsAndBytesConfig:
    """NF4 with double quantisation, computed in bf16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def base_options(options: AdapterArguments, args: TrainingArguments) -> dict[str, Any]:
    """What `from_pretrained` is given for a base: NF4; or dense, in bf16 if the run is and in fp32 if not."""
    if options.load_in_4bit:
        return {"dtype": torch.bfloat16, "quantization_config": nf4()}
    return {"dtype": torch.bfloat16 if args.bf16 else torch.float32}


def prepared(base: PreTrainedModel, options: AdapterArguments, args: TrainingArguments) -> PreTrainedModel:
    """A base that was loaded with `base_options`, ready for an adapter."""
    if not options.load_in_4bit:
        return base
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=bool(args.gradient_checkpointing))


def load_base(
    auto_class: Any, name: str, options: AdapterArguments, args: TrainingArguments, **more: Any
) -> PreTrainedModel:
    """The base `name`, in NF4 and prepared for training, or dense (`base_options`); `more` goes to
    `from_pretrained`."""
    return prepared(auto_class.from_pretrained(name, **{**base_options(options, args), **more}), options, args)
