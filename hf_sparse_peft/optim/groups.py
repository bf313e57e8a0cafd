"""Parameter groups: Trainer's split by weight decay, and by whatever else an optimizer tells parameters apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# Trainer.get_decay_parameter_names of transformers 5.23; it is a method of Trainer and needs one to be called.
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def parameter_groups(
    model: nn.Module, weight_decay: float, options_of: Callable[[str, nn.Parameter], dict[str, Any]] = lambda *_: {}
) -> list[dict[str, Any]]:
    """Groups for an optimizer: no decay for parameters of `nn.LayerNorm` and names with bias or norm in them, by the
    patterns of `Trainer.get_decay_parameter_names`, and one group for each set of options.

    Only trainable parameters; shared ones once; in the order of `model.named_parameters()`, those that decay first, so
    that a checkpoint matches by position.

    Args:
        model: any module.
        weight_decay: for what decays.
        options_of: called with name and parameter; options of its group, `weight_decay` among them if it is to differ.

    Returns: dicts with `params`, `weight_decay` and the options.

    Raises:
        ValueError: nothing trainable.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            options = {"weight_decay": weight_decay, **options_of(name, parameter)}
            options["weight_decay"] = options["weight_decay"] if name in decayed else 0.0
            key = (name not in decayed, *sorted(options.items()))
            groups.setdefault(key, {"params": [], **options})["params"].append(parameter)
    if not groups:
        raise ValueError(
            "model has no trainable parameter. Add an adapter or set requires_grad before building groups."
        )
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def embeddings_and_heads(model: nn.Module) -> set[int]:
    """ids of the weights of embeddings and of output heads, which optimizers of matrices leave aside."""
    found = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    for module in model.modules():
        head: Callable[[], Any] | None = getattr(module, "get_output_embeddings", None)
        try:
            weight = getattr(head(), "weight", None) if callable(head) else None
        except (AttributeError, NotImplementedError, TypeError):  # models of no language
            weight = None
        if weight is not None:
            found.append(weight)
    return {id(weight) for weight in found}
