"""What the active adapters of a layer add up to, as the operands of one product."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .factors import forward_factors
from .layer import SparseLoraLayer


@dataclass(frozen=True)
class Operands:
    """Operands of `ops.sparse_linear`: the sparse half, and the low-rank half with its scaling."""

    values: torch.Tensor | None = None
    units: torch.Tensor | None = None
    row_ends: torch.Tensor | None = None
    granularity: str = "entry"
    block_size: int = 0
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    scale: float = 1.0

    def without_support(self) -> Operands:
        """The low-rank half alone."""
        return Operands(A=self.A, B=self.B, gate=self.gate, scale=self.scale)

    @property
    def low_rank(self) -> dict:
        """Keyword arguments of the low-rank half."""
        return {"A": self.A, "B": self.B, "gate": self.gate}


def combine(layer: SparseLoraLayer, names: list[str]) -> Operands:
    """Operands of the sum of the adapters `names`: supports are united, components stand side by side."""
    return Operands(**_sparse_half(layer, names), **_low_rank_half(layer, names))


def _sparse_half(layer: SparseLoraLayer, names: list[str]) -> dict:
    names = [name for name in names if name in layer.sparse_lora_values and not _is_idle(layer, name)]
    if not names:
        return {}
    if any(name in layer.sparse_lora_dense_delta for name in names):
        return _with_dense_deltas(layer, names)
    grids = [layer.sparse_lora_grid[name] for name in names]
    cut = {"granularity": grids[0].granularity, "block_size": grids[0].block_size}
    if len(names) == 1:
        units, row_ends = layer.packed_units(names[0])
        return {"values": layer.living_values(names[0]), "units": units, "row_ends": row_ends, **cut}
    everything = [layer.units(name) for name in names]
    parts = [(layer.living_values(name), units) for name, units in zip(names, everything, strict=True)]
    if any(grid != grids[0] for grid in grids):
        # Units of different kinds only add up as entries.
        parts = [grid.as_entries(units, values)[::-1] for (values, units), grid in zip(parts, grids, strict=True)]
        cut = {"granularity": "entry", "block_size": 0}
    # Units that several adapters hold become one unit with the sum of their values; autograd splits it again.
    united, owner = torch.unique(torch.cat([units for _, units in parts]), return_inverse=True)
    stacked = torch.cat([values for values, _ in parts])
    values = stacked.new_zeros(united.numel(), *stacked.shape[1:]).index_add(0, owner, stacked)
    return {"values": values, "units": united, **cut}


def _is_idle(layer: SparseLoraLayer, name: str) -> bool:
    """Whether a support is undecided and nobody reads gradients or trains a dense delta in its place."""
    # In this order: compiled graphs are guarded by what they look at, and readers come and go.
    if not layer.is_undecided(name):
        return False
    return name not in layer.sparse_lora_dense_delta and name not in layer.sparse_lora_gradient_readers


def _with_dense_deltas(layer: SparseLoraLayer, names: list[str]) -> dict:
    """All rows as one support: the sum of the dense deltas and of the other adapters' updates."""
    total: torch.Tensor | None = None
    for name in names:
        part = layer.sparse_lora_dense_delta.get(name)
        if part is None:
            units, grid = layer.units(name), layer.sparse_lora_grid[name]
            positions, values = grid.as_entries(units, layer.living_values(name))
            flat = values.new_zeros(layer.out_features * layer.in_features).index_add(0, positions, values)
            part = flat.view(layer.out_features, layer.in_features)
        total = part if total is None else total + part
    rows = torch.arange(layer.out_features, device=total.device, dtype=torch.int32)
    return {"values": total, "units": rows, "granularity": "row", "block_size": 0}


def _low_rank_half(layer: SparseLoraLayer, names: list[str]) -> dict:
    names = [name for name in names if name in layer.sparse_lora_A]
    if not names:
        return {}
    if len(names) == 1:
        name = names[0]
        A, B = forward_factors(layer, name)
        return {
            "A": A,
            "B": B,
            "gate": layer.sparse_lora_gate.get(name, None),
            "scale": layer.sparse_lora_scaling[name],
        }
    pairs = [forward_factors(layer, name) for name in names]
    gates = [
        (layer.sparse_lora_gate[name] if name in layer.sparse_lora_gate else A.new_ones(A.shape[0]))
        * layer.sparse_lora_scaling[name]
        for name, (A, _) in zip(names, pairs, strict=True)
    ]
    return {
        "A": torch.cat([A for A, _ in pairs]),
        "B": torch.cat([B for _, B in pairs], dim=1),
        "gate": torch.cat(gates),
    }
