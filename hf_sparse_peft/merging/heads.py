"""Heads and biases of several adapters: absolute values, which are taken or averaged, and never added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sources import AdapterSource

MEAN = "mean"


def merged_others(
    sources: Sequence[AdapterSource], weights: Sequence[float], heads_from: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Heads and biases of the merged adapter by their keys, and the options that say what they are.

    What one adapter alone has, or all holders have alike, is taken. Else `heads_from` decides: the folder of one of the
    adapters, or "mean", the mean over the holders by their weights, in fp32.

    Raises:
        ValueError: others than these and no `heads_from`, one that is no adapter's, another shape, biases that are
            trained in different places, or a mean by weights that are not above 0; names the tensor.
    """
    favoured = None
    if heads_from is not None and heads_from != MEAN:
        folders = [str(source.path) for source in sources]
        if str(Path(heads_from)) not in folders:
            raise ValueError(f"heads_from={heads_from!r} is none of the adapters {folders}, and not 'mean'.")
        favoured = sources[folders.index(str(Path(heads_from)))]
    found = {}
    for key in sorted({key for source in sources for key in source.others}):
        holders = [(w, source) for w, source in zip(weights, sources, strict=True) if key in source.others]
        if favoured is not None and key in favoured.others:
            holders = [(1.0, favoured)]
        found[key] = _one(key, holders, heads_from)
    return found, _options(sources)


def _one(key: str, holders: Sequence[tuple[float, AdapterSource]], heads_from: str | None) -> Tensor:
    first = holders[0][1].others[key]
    odd = next((source for _, source in holders[1:] if not _same(source.others[key], first)), None)
    if odd is None:
        return first
    names = f"'{holders[0][1].path}' and '{odd.path}'"
    if heads_from != MEAN:
        raise ValueError(
            f"{names} have different copies of '{key}'. Heads and biases are no updates and are never added up: say "
            "whose are taken with heads_from= one of the folders, or heads_from='mean' for their mean by the weights."
        )
    total = sum(weight for weight, _ in holders)
    if min(weight for weight, _ in holders) < 0 or not total > 0:
        raise ValueError(f"heads_from='mean' of '{key}' needs weights of at least 0 that are not all 0.")
    if any(source.others[key].shape != first.shape for _, source in holders):
        raise ValueError(
            f"'{key}' has another shape in {names}: their heads are of different tasks. Take those of one."
        )
    mean = sum(weight / total * source.others[key].float() for weight, source in holders)
    return mean.to(first.dtype)


def _same(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)


def _options(sources: Sequence[AdapterSource]) -> dict[str, Any]:
    configs: list[Mapping[str, Any]] = [source.config for source in sources]
    heads = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    weights = sorted({name for config in configs for name in config.get("saved_base_weights") or ()})
    biases = {_bias(config) for config in configs} - {"none"}
    if len(biases) > 1:
        raise ValueError(
            f"The adapters train biases in different places (bias={sorted(biases)}), which no one adapter has. Train "
            "them with one value of bias."
        )
    return {
        "modules_to_save": heads or None,
        "saved_base_weights": weights or None,
        "bias": biases.pop() if biases else "none",
    }


def _bias(config: Mapping[str, Any]) -> str:
    given = config.get("bias") or "none"
    return "sparse_lora_only" if given.endswith("_only") else given
