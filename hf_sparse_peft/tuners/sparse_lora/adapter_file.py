"""What of an adapter goes into its file, and what is checked before a file's tensors reach any layer."""

from __future__ import annotations

import torch
from torch import nn

from .config import SparseLoraConfig
from .layer import SparseLoraLayer


def for_file(state_dict: dict[str, torch.Tensor], config: SparseLoraConfig) -> dict[str, torch.Tensor]:
    """The tensors to write: trained values in `config.values_dtype`, everything else as it is."""
    if config.values_dtype == "float32":
        return state_dict
    dtype = getattr(torch, config.values_dtype)
    trained = tuple(f".{name}." for name in SparseLoraLayer.adapter_layer_names)
    return {key: t.to(dtype) if any(mark in key for mark in trained) else t for key, t in state_dict.items()}


def support_sizes(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Units allocated in each adapted module, as `support_pattern` says it."""
    layers = [m for m in model.modules() if isinstance(m, SparseLoraLayer) and adapter_name in m.sparse_lora_config]
    held = {layer.module_name: layer.sparse_lora_values.get(adapter_name, None) for layer in layers}
    return {name: 0 if values is None else values.shape[0] for name, values in held.items()}
