"""The code on a card that loads the adapter: for every task, in any class of base."""

from __future__ import annotations

from typing import Any

import transformers
from peft import PeftModel
from torch import nn

from ..tuners.shared.base_overrides import BITSANDBYTES, QUANTIZATION
from ..tuners.shared.config import AdapterConfig
from .base_model import AUTO_CLASSES, base_class_name


def base_class(model: nn.Module, config: AdapterConfig) -> tuple[str, str]:
    """Name and module of the class that loads the base of this adapter."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    cls = type(base)
    trained = {"base_model_class": cls.__name__, "parent_library": cls.__module__}  # as peft writes it at saving
    found = {"task_type": config.task_type, "auto_mapping": config.auto_mapping or trained}
    name = base_class_name(found, getattr(getattr(base, "config", None), "architectures", None))
    return name, "transformers" if hasattr(transformers, name) else cls.__module__


def loading_code(
    class_of_base: tuple[str, str],
    shown: str,
    base_model: str | None,
    config: AdapterConfig,
    overrides: dict[str, Any],
    alone: bool = False,
) -> str:
    """Python that leaves the adapter on its base in `model`.

    Args:
        class_of_base: what `base_class` says.
        shown: folder or repo of the adapter.
        base_model: folder or Hub id of the base.
        config: of the adapter.
        overrides: `base_overrides` of the base.
        alone: without this package, for an adapter that was exported.
    """
    (name, library), labels = class_of_base, overrides.get("num_labels")
    first = [] if alone else ["import hf_sparse_peft  # registers the adapter type with peft"]
    if config.task_type in AUTO_CLASSES and labels is None and not config.saved_base_weights:
        auto = f"AutoPeftModel{name.removeprefix('AutoModel') or 'ForFeatureExtraction'}"
        return "\n".join([*first, f"from peft import {auto}", "", f'model = {auto}.from_pretrained("{shown}")'])
    lines = [*first, "from peft import PeftModel"]
    if library == "transformers":
        given = "" if labels is None else f", num_labels={labels}"
        # A head of another size in the base gives way to the adapter's own.
        given += ", ignore_mismatched_sizes=True" if given and config.modules_to_save else ""
        source = base_model or "name-of-the-base-model"
        lines += [f"from transformers import {name}", "", f'base = {name}.from_pretrained("{source}"{given})']
        if config.saved_base_weights:
            lines.append(f"base.resize_token_embeddings({overrides['vocab_size']}, mean_resizing=False)")
    else:
        lines += ["", f"base = ...  # the {name} of {library} that was trained, with its own weights"]
    return "\n".join([*lines, f'model = PeftModel.from_pretrained(base, "{shown}")'])


def trained_base(overrides: dict[str, Any], shown: str) -> str:
    """What to do about a base that was quantised; empty for one that was not."""
    if QUANTIZATION not in overrides:
        return ""
    said = f"It was trained on a quantised base ({quantization(overrides)})."
    if overrides[QUANTIZATION]["quant_method"] != BITSANDBYTES:
        return f"{said} Load the base as it was."
    return (
        f"{said} The code above takes the base as it is stored; this takes it as it was trained on:\n\n```python\n"
        f'from hf_sparse_peft import hub\n\nmodel = hub.load_adapter("{shown}")  # base_as="full": full precision\n```'
    )


def quantization(overrides: dict[str, Any]) -> str:
    """The quantisation of a base in a line."""
    return ", ".join(f"{key}={value}" for key, value in overrides[QUANTIZATION].items())
