"""Loading the base model of an adapter folder as the model that was trained: its labels, its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..tuners.shared.base_overrides import LABELS, embedding_rows
from ..tuners.shared.file_check import WEIGHTS_FILE

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_base(base: str, adapter_config: dict[str, Any], adapter: Path, **arguments: Any) -> PreTrainedModel:
    """The model `base` with the labels and the embedding rows that the adapter's config names (`base_overrides`).

    Weights that `base` does not have in these shapes must be in the adapter's file: nothing stays at random.

    Raises:
        ValueError: the model's class is unknown, its weights are damaged, or a weight is in neither of the two; names
            it.
    """
    overrides = adapter_config.get("base_overrides") or {}
    with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
        stored = {_base_name(key): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    # Before a config is made of it: transformers writes out a name for every label.
    where = {"revision": arguments["revision"]} if "revision" in arguments else {}
    _check_size("num_labels", overrides, AutoConfig.from_pretrained(base, **where).num_labels, stored)
    config = AutoConfig.from_pretrained(base, **where, **{k: v for k, v in overrides.items() if k in LABELS})
    try:
        model, info = _model_class(adapter_config, config).from_pretrained(
            base, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except SafetensorError as error:
        raise ValueError(f"The weights of '{base}' are damaged ({error}); copy or download them again.") from error
    started = {str(key) for key in info["missing_keys"]}
    started |= {str(entry[0] if isinstance(entry, (tuple, list)) else entry) for entry in info["mismatched_keys"]}
    rows, before = overrides.get("vocab_size"), embedding_rows(model)
    if rows is not None and before is not None and rows != before:
        _check_size("vocab_size", overrides, before, stored)
        model.resize_token_embeddings(rows, mean_resizing=False)
        if rows > before:
            started |= _embedding_weights(model)
    absent = sorted(started - set(stored))
    if absent:
        raise ValueError(
            f"'{absent[0]}' ({len(absent)} such weights) is in neither '{base}' nor '{adapter}' in the shape that was "
            "trained, and would stay at random numbers. Pass --base with the model as it was trained, or train again "
            f"with modules_to_save=['{absent[0].rpartition('.')[0].rpartition('.')[2]}']."
        )
    return model


def _base_name(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _check_size(field: str, overrides: dict[str, Any], of_base: int, stored: dict[str, list[int]]) -> None:
    """A config may name any number: one that the base does not have must be a side of a tensor in the file."""
    size = overrides.get(field)
    if size is None or size == of_base:
        return
    is_count = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not is_count or (size > of_base and not any(size in shape for shape in stored.values())):
        raise ValueError(
            f"base_overrides[{field!r}]={size!r} in adapter_config.json is not what the base has ({of_base}), and no "
            f"tensor of that size is in {WEIGHTS_FILE}. Pass --base with the model as it was trained."
        )


def _model_class(adapter_config: dict[str, Any], config: Any) -> Any:
    name = _AUTO_CLASSES.get(adapter_config.get("task_type"))
    name = name or (adapter_config.get("auto_mapping") or {}).get("base_model_class")
    name = name or (getattr(config, "architectures", None) or ["AutoModel"])[0]
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"The base model is a {name}, a class that transformers does not have; load it yourself and call "
            "hf_sparse_peft.hub.merge_to_dense or export_lora."
        )
    return found


def _embedding_weights(model: nn.Module) -> set[str]:
    """Names of the input and output embeddings' parameters; of tied ones the first."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    held = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}
