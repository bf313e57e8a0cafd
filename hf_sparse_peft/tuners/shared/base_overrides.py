"""What a base model was made into before it was trained, so that it can be loaded as the same model again."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

LABELS = ("num_labels", "id2label", "label2id", "problem_type")


def base_overrides(model: nn.Module) -> dict[str, Any]:
    """Labels of a classifier (`num_labels`; names and `problem_type` where they are set) and rows of the input
    embedding (`vocab_size`), as `transformers` takes them; empty for models of other libraries."""
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
    return found


def embedding_rows(base: nn.Module) -> int | None:
    """Rows of the input embedding of a transformers model; None where it has none."""
    try:
        weight = base.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return weight.shape[0] if weight.ndim == 2 else None
