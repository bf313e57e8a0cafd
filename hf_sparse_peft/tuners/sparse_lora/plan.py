"""What was decided for one module: how its weight is cut, how many units and components it has, how they are scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...sparsity import UnitGrid
from .config import SparseLoraConfig


@dataclass(frozen=True)
class ModuleSizes:
    """Sizes of both halves of an adapter on one module; either may be 0."""

    grid: UnitGrid | None
    """How the weight is cut into units; None without a support."""
    units: int
    """Units of the first support."""
    capacity: int
    """Units that values and support have room for, retired ones included."""
    rank: int
    """Components of the low-rank half."""
    scaling: float | None = None
    """What multiplies the low-rank half, `lora_alpha / r` or `lora_alpha / sqrt(r)`; None without one."""
    support_scaling: float | None = None
    """What multiplies the sparse half; None without one."""


def module_sizes(
    config: SparseLoraConfig, name: str, rows: int, cols: int, units: int, capacity: int = 0
) -> ModuleSizes:
    """Sizes of the module of that name with `units` units, `capacity` at least, and the config's rank.

    Raises:
        ValueError: the weight has fewer units, blocks do not divide it, or `scale_support` has no scaling to take.
    """
    grid = UnitGrid(rows, cols, config.granularity_of(name), config.block_size) if units else None
    if units and units > grid.num_units:
        raise ValueError(
            f"The support of '{name}' wants {units} {grid.granularity} units, and its {rows}x{cols} weight has "
            f"{grid.num_units}. Lower density or num_entries."
        )
    rank = config.rank_of(name)
    scaling = config.alpha_of(name) / (math.sqrt(rank) if config.use_rslora else rank) if rank else None
    if units and config.scale_support and not rank:
        raise ValueError(
            f"scale_support multiplies the support of '{name}' by lora_alpha / r, and rank_pattern gives it rank 0. "
            "Give it a rank, or set scale_support=False."
        )
    support_scaling = (scaling if config.scale_support else 1.0) if units else None
    return ModuleSizes(grid, units, max(capacity, units), rank, scaling, support_scaling)
