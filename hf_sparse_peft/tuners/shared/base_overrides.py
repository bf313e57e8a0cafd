"""What a base model was made into before it was trained, so that it can be loaded as the same model again."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn

LABELS = ("num_labels", "id2label", "label2id", "problem_type")
QUANTIZATION = "quantization_config"
"""Key of the base's quantisation: the options of transformers' quantisation config, and its `quant_method`."""
QUANTIZED_FROM = "quantized_from"
"""Key of the dtype of the weights that were quantised: their rounding to it is part of what was trained on."""
BITSANDBYTES = "bitsandbytes"


def base_overrides(model: nn.Module) -> dict[str, Any]:
    """Labels of a classifier (`num_labels`; names and `problem_type` where they are set), rows of the input embedding
    (`vocab_size`) and the quantisation (`base_quantization`), as `transformers` takes them; empty for models of other
    libraries."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(base, "config", None)
    if not hasattr(config, "to_diff_dict"):
        return {}
    found: dict[str, Any] = {}
    if isinstance(getattr(base, "num_labels", None), int):  # classifiers have it; configs of all models do
        found["num_labels"] = base.num_labels
        names = getattr(config, "id2label", None) or {}
        if any(name != f"LABEL_{number}" for number, name in names.items()):
            found |= {"id2label": {str(k): v for k, v in names.items()}, "label2id": dict(config.label2id)}
        if getattr(config, "problem_type", None):
            found["problem_type"] = config.problem_type
    rows = embedding_rows(base)
    if rows is not None:
        found["vocab_size"] = rows
    return found | base_quantization(config)


def base_quantization(config: Any) -> dict[str, Any]:
    """How the model with this config is quantised, as JSON: `quantization_config` and, of weights that were quantised
    while they were loaded, `quantized_from`, the dtype that they had; empty where it is not.

    Of bitsandbytes: 4-bit type, compute dtype, double quantisation and storage, or what the 8-bit layers are made with.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return {}
    options = dict(given) if isinstance(given, dict) else given.to_dict()
    method = str(getattr(options.get("quant_method"), "value", options.get("quant_method")))
    options = {key: _json(value) for key, value in options.items() if not key.startswith("_") and key != "quant_method"}
    if method == BITSANDBYTES:
        bits = "4bit" if options.get("load_in_4bit") else "8bit"
        of_kind = "bnb_4bit" if bits == "4bit" else "llm_int8"
        wanted = (f"load_in_{bits}", of_kind, "llm_int8_skip_modules")
        options = {key: value for key, value in options.items() if key.startswith(wanted) and value is not None}
    dtype = getattr(config, "dtype", None)
    loaded_as = {QUANTIZED_FROM: _json(dtype)} if isinstance(dtype, torch.dtype) else {}
    return {QUANTIZATION: {"quant_method": method, **options}, **loaded_as}


def recorded_overrides(model: nn.Module, config: Any) -> dict[str, Any]:
    """`base_overrides` for a file. An adapter that was loaded to be used keeps what it says of its base's quantisation:
    it was trained on that, whatever it runs on now."""
    found = base_overrides(model)
    if not (config.inference_mode and config.base_overrides):
        return found
    if not found:  # layers that stand for a base that is not here
        return dict(config.base_overrides)
    quantization = {k: v for k, v in config.base_overrides.items() if k in (QUANTIZATION, QUANTIZED_FROM)}
    return {k: v for k, v in found.items() if k not in (QUANTIZATION, QUANTIZED_FROM)} | quantization


def embedding_rows(base: nn.Module) -> int | None:
    """Rows of the input embedding of a transformers model; None where it has none."""
    try:
        weight = base.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return weight.shape[0] if weight.ndim == 2 else None


def _json(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, dict):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_json(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
