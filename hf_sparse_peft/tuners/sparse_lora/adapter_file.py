"""What of an adapter goes into its file, and what is checked before a file's tensors reach any layer."""

from __future__ import annotations

import torch
from torch import nn

from ...sparsity import decode_support
from ..state_dict import present, settle_training_state
from .config import SparseLoraConfig
from .layer import SparseLoraLayer


def for_file(state_dict: dict[str, torch.Tensor], config: SparseLoraConfig) -> dict[str, torch.Tensor]:
    """The tensors to write: trained values in `config.values_dtype`, everything else as it is."""
    if config.values_dtype == "float32":
        return state_dict
    dtype = getattr(torch, config.values_dtype)
    trained = tuple(f".{name}." for name in SparseLoraLayer.adapter_layer_names)
    return {key: t.to(dtype) if any(mark in key for mark in trained) else t for key, t in state_dict.items()}


def from_file(
    state_dict: dict[str, torch.Tensor], model: nn.Module, config: SparseLoraConfig, adapter_name: str
) -> dict[str, torch.Tensor]:
    """The tensors to load, checked whole before any of them reaches a layer.

    State of running schedules is dropped where the adapter does not train, allocated again where a finished run freed
    it, and starts anew where a file has none.

    Raises:
        ValueError: a tensor is missing, has another shape, is not finite, or its support is truncated, out of range,
            unsorted, duplicated, damaged or made for another base; the message names the tensor.
    """
    state_dict = dict(state_dict)
    open_sizes = config.sizes_from_data
    if open_sizes:
        _take_sizes(state_dict, model, config, adapter_name)
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLoraLayer):
            _check_layer(state_dict, f"{name}." if name else "", layer, adapter_name)
            settle_training_state(state_dict, f"{name}." if name else "", layer, adapter_name)
    if open_sizes:
        config.support_pattern = support_sizes(model, adapter_name)
    return state_dict


def support_sizes(model: nn.Module, adapter_name: str) -> dict[str, int]:
    """Units allocated in each adapted module, as `support_pattern` says it."""
    layers = [m for m in model.modules() if isinstance(m, SparseLoraLayer) and adapter_name in m.sparse_lora_config]
    held = {layer.module_name: layer.sparse_lora_values.get(adapter_name, None) for layer in layers}
    return {name: 0 if values is None else values.shape[0] for name, values in held.items()}


def _take_sizes(
    state_dict: dict[str, torch.Tensor], model: nn.Module, config: SparseLoraConfig, adapter_name: str
) -> None:
    """Make the supports as large as the file's: its run chose them from data, which this config has not seen."""
    for name, layer in model.named_modules():
        if not isinstance(layer, SparseLoraLayer) or adapter_name not in layer.sparse_lora_values:
            continue
        values = state_dict.get(f"{name}.sparse_lora_values.{adapter_name}".removeprefix("."))
        if values is None and (config.criterion == "given" or config.structure_of(layer.module_name)):
            layer.resize_support(adapter_name, 0)
        elif (
            values is not None and values.ndim and 0 < values.shape[0] <= layer.sparse_lora_grid[adapter_name].num_units
        ):
            layer.resize_support(adapter_name, values.shape[0])


def _check_layer(state_dict: dict[str, torch.Tensor], prefix: str, layer: SparseLoraLayer, adapter_name: str) -> None:
    if adapter_name in layer.sparse_lora_support:
        key = f"{prefix}sparse_lora_support.{adapter_name}"
        capacity = layer.sparse_lora_values[adapter_name].shape[0]
        decode_support(present(state_dict, key), layer.sparse_lora_grid[adapter_name], capacity, key)
    for kind in (*layer.adapter_layer_names, *layer.factor_map_names, "sparse_lora_rank_mask"):
        held = getattr(layer, kind)
        if adapter_name not in held:
            continue
        key = f"{prefix}{kind}.{adapter_name}"
        tensor, expected = present(state_dict, key), tuple(held[adapter_name].shape)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"'{key}' in the adapter file has shape {tuple(tensor.shape)}, and its config on this base makes it "
                f"{expected}. The file is truncated or belongs to another base model or config."
            )
        if kind != "sparse_lora_rank_mask":
            if not torch.isfinite(tensor).all():
                raise ValueError(f"'{key}' in the adapter file has values that are not finite; the adapter is damaged.")
            # The file may hold bf16, masters are fp32. A copy, because with low_cpu_mem_usage the layer would keep the
            # mapped file itself, and BLAS rounds by how its operands are aligned.
            state_dict[key] = tensor.to(held[adapter_name].dtype, copy=True)
