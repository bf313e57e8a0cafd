"""The end of an adapter's training: dead units and components go for good, and the config says what is left."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from .config import SparseLoraConfig, exact_pattern
from .factors import fold_experts
from .layer import SparseLoraLayer
from .support_state import undecided_message


@torch.no_grad()
def compact(
    model: nn.Module,
    config: SparseLoraConfig,
    adapter_name: str,
    values_dtype: str | None = None,
    drop_within: float | None = None,
) -> None:
    """Shrink the adapter to what lives, in place, and write the result into its config.

    Values and outputs stay what they were, but for units whose numbers all lie within `drop_within` (None: what the
    config says) of zero, which leave too. With `values_dtype="bfloat16"` values are rounded to bf16, as the file holds
    them. Parameters are replaced, so an optimizer built before knows nothing of them: call this when training is over.

    Raises:
        ValueError: `values_dtype` is not one that a file can hold, or the adapter is merged.
    """
    if values_dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"values_dtype={values_dtype!r} is unknown; choose 'float32' or 'bfloat16'.")
    layers = [m for m in model.modules() if isinstance(m, SparseLoraLayer) and adapter_name in m.sparse_lora_config]
    drop_within = config.drop_within if drop_within is None else drop_within
    merged = [layer.module_name for layer in layers if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(f"Adapter '{adapter_name}' is merged (e.g. into '{merged[0]}'); call unmerge_adapter() first.")
    if any(layer.is_undecided(adapter_name) for layer in layers):
        raise ValueError(f"Nothing to compact: {undecided_message(adapter_name, config)}")
    support_pattern, rank_pattern, alpha_pattern, shrunk = {}, {}, {}, False
    split = config.factor_masks is not None and config.factor_masks.kind == "stochastic"
    for layer in layers:
        layer.drop_training_state(adapter_name)
        if split and adapter_name in layer.sparse_lora_A:
            fold_experts(layer, adapter_name)
        support_pattern[layer.module_name] = _compact_support(layer, adapter_name, drop_within)
        if adapter_name in layer.sparse_lora_A:
            before = layer.sparse_lora_r[adapter_name]
            rank = _compact_rank(layer, adapter_name)
            shrunk = shrunk or rank != before
            scaling = layer.sparse_lora_scaling[adapter_name]
            rank_pattern[layer.module_name] = rank
            alpha_pattern[layer.module_name] = scaling * (rank**0.5 if config.use_rslora else rank)
        else:
            rank_pattern[layer.module_name] = 0
    if config.has_support:
        config.support_pattern, config.capacity_pattern = support_pattern, {}
    if shrunk:
        config.rank_pattern = exact_pattern(rank_pattern)
        config.alpha_pattern = exact_pattern(alpha_pattern)
    if split:
        config.factor_masks = None
    config.training_finished = True
    if values_dtype is not None:
        config.values_dtype = values_dtype
        for layer in layers:
            _round_values(layer, adapter_name, getattr(torch, values_dtype))


def _compact_support(layer: SparseLoraLayer, adapter_name: str, drop_within: float | None) -> int:
    if adapter_name not in layer.sparse_lora_values:
        return 0
    units = layer.units(adapter_name)
    slots = torch.arange(units.numel(), device=units.device)
    if drop_within is not None:
        size = layer.living_values(adapter_name).unsqueeze(1).flatten(1).abs().amax(1)
        slots = slots[~(size <= drop_within)]  # what is not a number stays, to be seen
        units = units[slots]
    alive = units.numel()
    if alive < layer.sizes[adapter_name].capacity:
        sizes = replace(layer.sizes[adapter_name], units=alive, capacity=alive)
        layer.resize(adapter_name, sizes, {"support": slots})
        if alive:
            layer.write_support(adapter_name, units)
    return alive


def _compact_rank(layer: SparseLoraLayer, adapter_name: str) -> int:
    if adapter_name not in layer.sparse_lora_rank_mask:
        return layer.sparse_lora_r[adapter_name]
    alive = layer.sparse_lora_rank_mask[adapter_name].nonzero().squeeze(1)
    rank = alive.numel()
    if rank < layer.sizes[adapter_name].rank:
        layer.resize(adapter_name, replace(layer.sizes[adapter_name], rank=rank), {"rank": alive})
    return rank


def _round_values(layer: SparseLoraLayer, adapter_name: str, dtype: torch.dtype) -> None:
    for name in layer.adapter_layer_names:
        held = getattr(layer, name)
        if adapter_name in held:
            held[adapter_name].data = held[adapter_name].data.to(dtype).to(held[adapter_name].dtype)
