"""Supports and subnets of a model without weights: so many units, wherever they may lie."""

from __future__ import annotations

import torch

from ...sparsity import Grid, coded_parts
from .subnet import COLUMNS, ROWS, SubnetState
from .support import KnownSupport, PackedUnits, SupportState


def assume_units(layer: SupportState | SubnetState, adapter_name: str) -> None:
    """Let `layer`, on the meta device, compute as if the adapter's units had been chosen.

    Raises:
        ValueError: the layer has weights, and with them units of its own.
    """
    if not layer.get_base_layer().weight.is_meta:
        raise ValueError(f"'{layer.module_name}' has weights, and units that are known. Assume them on meta only.")
    if adapter_name in layer.sparse_lora_support:
        _assume_support(layer, adapter_name)
    if adapter_name in layer.sparse_lora_subnet:
        sides = layer.sparse_lora_subnet[adapter_name].shape
        buffers = [getattr(layer, name)[adapter_name] for name in (ROWS, COLUMNS)]
        mark = [(codes, codes.data_ptr(), codes._version) for codes in buffers]
        units = tuple(torch.empty(side, dtype=torch.int32, device="meta") for side in sides)
        layer._subnets[adapter_name] = (mark, units)


def _assume_support(layer: SupportState, adapter_name: str) -> None:
    codes, grid = layer.sparse_lora_support[adapter_name], layer.sparse_lora_grid[adapter_name]
    count = layer.sizes[adapter_name].units
    packed = PackedUnits(torch.empty(count, dtype=grid.index_dtype, device="meta"))
    if grid.granularity == "entry":
        pattern, lines = layer.adapter_configs[adapter_name].known_pattern, (None, None)
        if isinstance(pattern, Grid):
            lines = tuple(torch.empty(side, dtype=torch.int16, device="meta") for side in pattern.sides(grid))
        packed = PackedUnits(*coded_parts(codes.data, grid, count), *lines)
    layer._units[adapter_name] = KnownSupport(codes, codes.data_ptr(), codes._version, b"", packed)
