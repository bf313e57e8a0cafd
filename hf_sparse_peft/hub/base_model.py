"""The base model of an adapter: which class loads it, and loading it as the model that was trained, with its labels,
its vocabulary and its quantisation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.modelcard import TASK_MAPPING

from ..tuners.shared.base_overrides import BITSANDBYTES, LABELS, QUANTIZATION, QUANTIZED_FROM, embedding_rows
from ..tuners.shared.file_check import WEIGHTS_FILE

BaseAs = Literal["trained", "full"]

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""Task types of peft, and the classes of transformers that their bases are loaded with."""
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}


def base_class_name(adapter_config: Mapping[str, Any], architectures: list[str] | None = None) -> str:
    """Name of the class that loads the base of an adapter: that of its task type, else the class that was trained
    (`auto_mapping`, written when it is saved), else the first of the base's own `architectures`. Of the last two the
    first that transformers has.

    Raises:
        ValueError: none of the three says anything.
    """
    task = adapter_config.get("task_type")
    if task in AUTO_CLASSES:
        return AUTO_CLASSES[task]
    trained = (adapter_config.get("auto_mapping") or {}).get("base_model_class")
    named = [name for name in (trained, *(architectures or ())) if name]
    if not named:
        raise ValueError(
            "Neither the adapter (task_type, auto_mapping) nor its base (architectures) says which class the base is "
            'loaded with. Set task_type in adapter_config.json, e.g. "CAUSAL_LM".'
        )
    return next((name for name in named if hasattr(transformers, name)), named[0])


def pipeline_of(class_name: str) -> str | None:
    """The Hub's name for what models of a class do, as transformers knows it; None for classes of several uses."""
    if class_name in _PIPELINES:
        return _PIPELINES[class_name]
    tasks = (task for task, classes in TASK_MAPPING.items() if class_name in classes.values())
    return next((task for task in tasks if task != "text2text-generation"), None)  # which the Hub has dropped


def load_base(
    base: str, adapter_config: dict[str, Any], adapter: Path, *, base_as: BaseAs = "full", **arguments: Any
) -> PreTrainedModel:
    """The model `base` with the labels and the embedding rows that the adapter's config names (`base_overrides`), and
    with `base_as="trained"` in the quantisation that the adapter was trained on.

    Weights that `base` does not have in these shapes must be in the adapter's file: nothing stays at random.

    Raises:
        ValueError: the model's class is unknown, its weights are damaged, a weight is in neither of the two, or the
            base cannot be had as `base_as` asks; names it.
    """
    overrides = adapter_config.get("base_overrides") or {}
    with safe_open(adapter / WEIGHTS_FILE, framework="pt") as file:
        stored = {_base_name(key): file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    # Before a config is made of it: transformers writes out a name for every label.
    where = {"revision": arguments["revision"]} if "revision" in arguments else {}
    _check_size("num_labels", overrides, AutoConfig.from_pretrained(base, **where).num_labels, stored)
    config = AutoConfig.from_pretrained(base, **where, **{k: v for k, v in overrides.items() if k in LABELS})
    if "quantization_config" not in arguments:
        arguments |= _quantization(base, overrides, config, base_as, arguments.get("dtype", "auto"))
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
    name = base_class_name(adapter_config, getattr(config, "architectures", None))
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"The base model is a {name}, a class that transformers does not have; load it yourself and call "
            "hf_sparse_peft.hub.merge_to_dense or export_lora."
        )
    return found


def _quantization(base: str, overrides: dict[str, Any], config: Any, base_as: str, dtype: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` that give the base as `base_as` asks."""
    if base_as not in ("trained", "full"):
        raise ValueError(f"base_as={base_as!r} is neither 'trained' (quantised as it was trained on) nor 'full'.")
    stored, trained = getattr(config, "quantization_config", None), overrides.get(QUANTIZATION)
    if base_as == "full":
        if stored is not None:
            raise ValueError(
                f"base_as='full': the weights of '{base}' are stored quantised. Pass base= with the model that they "
                "were made of, or base_as='trained'."
            )
        return {}
    if trained is None or stored is not None:  # what is stored quantised was trained on as it is stored
        return {}
    given = _bitsandbytes_config(trained)
    recorded = overrides.get(QUANTIZED_FROM)
    return {"quantization_config": given} | ({"dtype": recorded} if dtype == "auto" and recorded else {})


def _bitsandbytes_config(options: Any) -> BitsAndBytesConfig:
    """From what `base_quantization` recorded; a file may say anything."""
    known = set(inspect.signature(BitsAndBytesConfig).parameters) - {"kwargs"}
    method = options.get("quant_method") if isinstance(options, dict) else None
    if method != BITSANDBYTES:
        raise ValueError(
            f"base_overrides[{QUANTIZATION!r}] in adapter_config.json says that the adapter was trained on a base of "
            f"quant_method={method!r}, and only {BITSANDBYTES!r} is applied to a base that is stored in full "
            "precision. Load the base yourself and the adapter with PeftModel.from_pretrained, or pass base_as='full'."
        )
    chosen = {key: value for key, value in options.items() if key != "quant_method"}
    try:
        if foreign := sorted(set(chosen) - known):
            raise ValueError(f"it has no option {foreign[0]!r}")
        return BitsAndBytesConfig(**chosen)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"base_overrides[{QUANTIZATION!r}] in adapter_config.json is no BitsAndBytesConfig: {error}. Pass "
            "base_as='full', or quantization_config= as it was trained."
        ) from error


def _embedding_weights(model: nn.Module) -> set[str]:
    """Names of the input and output embeddings' parameters; of tied ones the first."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    held = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}
