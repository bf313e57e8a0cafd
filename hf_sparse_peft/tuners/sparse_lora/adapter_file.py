"""What of an adapter goes into its file, and what is checked before a file's tensors reach any layer."""

from __future__ import annotations

import torch
from torch import nn

from ...sparsity import codes_length, decode_support
from ..shared.state_dict import check_layer
from .config import SparseLoraConfig
from .file_check import check_codes
from .layer import SparseLoraLayer


def for_file(state_dict: dict[str, torch.Tensor], config: SparseLoraConfig) -> dict[str, torch.Tensor]:
    """The tensors to write: trained values in `config.values_dtype`, everything else as it is."""
    if config.values_dtype == "float32":
        return state_dict
    dtype = getattr(torch, config.values_dtype)
    trained = tuple(f".{name}." for name in SparseLoraLayer.adapter_layer_names)
    return {key: t.to(dtype) if any(mark in key for mark in trained) else t for key, t in state_dict.items()}


def check_sparse_layer(
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    layer: SparseLoraLayer,
    config: SparseLoraConfig,
    adapter_name: str,
) -> None:
    """Check the file's tensors of one layer, codes and masks included.

    Raises:
        ValueError: a tensor is missing, has another shape or dtype, is not finite, or its support is truncated, out of
            range, unsorted, duplicated, damaged or made for another base; the message names the tensor.
    """
    sizes = {}
    if adapter_name in layer.sparse_lora_support:
        count = layer.sparse_lora_values[adapter_name].shape[0]
        if config.sizes_from_data:
            count = _count_in_file(state_dict, prefix, layer, config, adapter_name)
        key, grid = f"{prefix}sparse_lora_support.{adapter_name}", layer.sparse_lora_grid[adapter_name]
        if count:
            sizes["sparse_lora_values"] = grid.values_shape(count)
            sizes["sparse_lora_support"] = (codes_length(grid, count),)
            if key in state_dict:
                decode_support(state_dict[key], grid, count, key)
        else:
            sizes |= {"sparse_lora_values": None, "sparse_lora_support": None}
    for kind, tensor in check_layer(state_dict, prefix, layer, adapter_name, sizes).items():
        check_codes(kind, tensor, config, f"{prefix}{kind}.{adapter_name}")


def take_sizes(
    state_dict: dict[str, torch.Tensor], model: nn.Module, config: SparseLoraConfig, adapter_name: str
) -> None:
    """Make the supports as large as the file's, which was checked: its run chose them from data, which this config has
    not seen."""
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLoraLayer) and adapter_name in layer.sparse_lora_values:
            prefix = f"{name}." if name else ""
            layer.resize_support(adapter_name, _count_in_file(state_dict, prefix, layer, config, adapter_name))
    config.support_pattern = support_sizes(model, adapter_name)


def support_sizes(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Units allocated in each adapted module, as `support_pattern` says it."""
    layers = [m for m in model.modules() if isinstance(m, SparseLoraLayer) and adapter_name in m.sparse_lora_config]
    held = {layer.module_name: layer.sparse_lora_values.get(adapter_name, None) for layer in layers}
    return {name: 0 if values is None else values.shape[0] for name, values in held.items()}


def _count_in_file(
    state_dict: dict[str, torch.Tensor], prefix: str, layer: SparseLoraLayer, config: SparseLoraConfig, name: str
) -> int:
    values = state_dict.get(f"{prefix}sparse_lora_values.{name}")
    if values is None and (config.criterion == "given" or config.structure_of(layer.module_name)):
        return 0
    count = values.shape[0] if values is not None and values.ndim else 0
    fits = 0 < count <= layer.sparse_lora_grid[name].num_units
    return count if fits else layer.sparse_lora_values[name].shape[0]
