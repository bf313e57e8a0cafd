"""The adapted linear layer: one fused product with the frozen base."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.utils.quantization_utils import quantization_extra_repr
from torch import nn

from ...ops import (
    DenseSource,
    Plan,
    Source,
    register_owner,
    shifted,
    sparse_linear,
    sparse_linear_node,
)
from ...rules.gradient_readers import SharedReader
from ..shared.base_weight import compute_dtype, weight_source
from ..shared.layer import AdapterLayer
from ..shared.merge import MergeMixin
from ..shared.quantised import base_product
from .factors import forward_factors
from .layer import SparseLoraLayer


class SparseLoraLinear(nn.Module, MergeMixin, SparseLoraLayer):
    r""":math:`Y = X W^\top + X S^\top + s\,((X A^\top) \odot g) B^\top + b` for the active adapters."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, module_name: str, update: dict[str, Any] | None, **kwargs: Any
    ) -> None:
        super().__init__()
        SparseLoraLayer.__init__(self, base_layer, module_name, **kwargs)
        self._active_adapter = adapter_name
        self._owner = register_owner(self)
        self.register_load_state_dict_post_hook(_refresh_units)
        if update is not None:
            self.update_layer(adapter_name, **update)

    # nn.Module comes first, with a forward that only raises.
    forward, train, _apply = AdapterLayer.forward, AdapterLayer.train, AdapterLayer._apply

    def _adapted(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        source = None if args or kwargs else weight_source(self)
        dtype = compute_dtype(self, x, source)
        shifts = self._shifts(names)
        source = shifted(source, shifts) if source is not None and shifts else source
        operands = combine(self, names)
        dropout = self._dropout(names) if self.training and operands.A is not None else 0.0
        low_rank = {} if dropout else operands.low_rank
        if source is None:
            base = base_product(self, x, *args, **kwargs)
            update = self._product(x, None, dtype, operands, low_rank)
            for shift in shifts:
                update = update + nn.functional.linear(x.to(dtype), shift.to(dtype))
            # Out of place: some 4-bit kernels return views that must not be written to.
            result = base + update.to(base.dtype)
        else:
            result = self._product(x, source, dtype, operands, low_rank, self.base_layer.bias)
            if self.quantization_backend is not None:  # 4-bit layers answer in the input's dtype
                result = result.to(x.dtype)
        return result + self._dropped_low_rank(x, operands, dtype, dropout).to(result.dtype) if dropout else result

    def _dropped_low_rank(self, x: torch.Tensor, operands: Operands, dtype: torch.dtype, p: float) -> torch.Tensor:
        """The low-rank half on an input of its own, as LoRA's dropout wants it."""
        return self._product(
            nn.functional.dropout(x.to(dtype), p), None, dtype, operands.without_support(), operands.low_rank
        )

    def _product(
        self,
        x: torch.Tensor,
        source: Source | None,
        dtype: torch.dtype,
        operands: Operands,
        low_rank: dict[str, torch.Tensor],
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        tensors = {**operands.sparse, "bias": bias, **low_rank}
        cut = {"granularity": operands.granularity, "block_size": operands.block_size, "scale": operands.scale}
        # With dropout there are two products: the support's is read, without one the low-rank half's.
        sparse = (self.sparse_lora_values, self.sparse_lora_subnet)
        with_support = any(name in one for name in self.active_adapters for one in sparse)
        read = operands.values is not None or (bool(low_rank) and not with_support)
        if not torch.compiler.is_compiling():
            if read:
                passive = self.passive_gradient_reader
                if hasattr(passive, "expect"):
                    passive.expect()
                cut |= {"gradient_reader": self.runtime_reader(), "passive_reader": passive}
            if operands.counts is not None:
                cut["units_version"] = partial(self.units_version, tuple(self.active_adapters))
            plan = Plan(self.out_features, self.in_features, dtype, source, **cut)
            return sparse_linear(x, plan, **tensors)
        dense = isinstance(source, DenseSource)
        return sparse_linear_node(
            x.to(dtype),
            self._owner,
            self.out_features,
            weight=source.weight if dense else None,
            transposed=dense and source.transposed,
            dequantized=source is not None and not dense,
            may_read=read and self._may_be_read(),
            read=read,
            **tensors,
            **cut,
        )

    def runtime_source(self) -> Source | None:
        """The weight's source, for compiled graphs (`ops.compiled`)."""
        source, shifts = weight_source(self), self._shifts(self._held_and_active())
        return shifted(source, shifts) if source is not None and shifts else source

    def _held_and_active(self) -> list[str]:
        return [name for name in self.active_adapters if self.holds(name)]

    def _shifts(self, names: list[str]) -> list[torch.Tensor]:
        """What the adapters `names` have accumulated (`subnet`)."""
        found = [kept for kept in map(self.accumulated, names) if kept is not None]
        if found and torch.compiler.is_compiling() and names != self._held_and_active():
            raise ValueError(
                f"'{self.module_name}': a compiled model cannot run a mixed batch (adapter_names) of adapters with an "
                "accumulator of what their subnets left. Run it without torch.compile."
            )
        return found

    def runtime_reader(self) -> SharedReader | None:
        """Who reads this layer's dense gradient at this step, for compiled graphs too; None as a rule."""
        reader = self._shared_reader(self._held_and_active())
        if reader is not None:
            reader.expect()  # asked in forward passes; inside a backward pass nothing is counted
        return reader

    def _may_be_read(self) -> bool:
        configs = [self.adapter_configs[name] for name in self.active_adapters if self.holds(name)]
        return any("gradient" in rule.all_needs for config in configs for rule in config.rules)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._owner = register_owner(self)  # a copy must not answer for the original

    def _dropout(self, names: list[str]) -> float:
        rates = {self.adapter_configs[name].lora_dropout for name in names if name in self.sparse_lora_A}
        if len(rates) > 1:
            raise ValueError(
                f"Active adapters {names} have different lora_dropout {sorted(rates)}; train them one by one."
            )
        return rates.pop() if rates else 0.0

    def extra_repr(self) -> str:
        """Name of the quantisation backend, as upstream's layers show it."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "sparse_lora." + super().__repr__()


def _refresh_units(layer: SparseLoraLinear, incompatible_keys: Any) -> None:
    layer.refresh_units()


@dataclass(frozen=True)
class Operands:
    """Operands of `ops.sparse_linear`: the sparse half, and the low-rank half with its scaling."""

    values: torch.Tensor | None = None
    units: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    live_rows: torch.Tensor | None = None
    live_columns: torch.Tensor | None = None
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
    def sparse(self) -> dict:
        """Keyword arguments of the sparse half."""
        return {name: getattr(self, name) for name in ("values", "units", "counts", "live_rows", "live_columns")}

    @property
    def low_rank(self) -> dict:
        """Keyword arguments of the low-rank half."""
        return {"A": self.A, "B": self.B, "gate": self.gate}


def combine(layer: SparseLoraLayer, names: list[str]) -> Operands:
    """Operands of the sum of the adapters `names`: supports are united, components stand side by side."""
    return Operands(**_sparse_half(layer, names), **_low_rank_half(layer, names))


def _sparse_half(layer: SparseLoraLayer, names: list[str]) -> dict:
    names = [name for name in names if layer.has_sparse_half(name) and not is_idle(layer, name)]
    if not names:
        return {}
    if any(name in layer.sparse_lora_dense_delta for name in names):
        return _with_dense_deltas(layer, names)
    if any(name in layer.sparse_lora_subnet for name in names):
        return _with_subnets(layer, names)
    grids = [layer.sparse_lora_grid[name] for name in names]
    cut = {"granularity": grids[0].granularity, "block_size": grids[0].block_size}
    if len(names) == 1:
        return {"values": layer.living_values(names[0]), **layer.packed_units(names[0])._asdict(), **cut}
    everything = [layer.units(name) for name in names]
    parts = [(layer.living_values(name), units) for name, units in zip(names, everything, strict=True)]
    if any(grid != grids[0] for grid in grids):
        # Units of different kinds only add up as entries.
        parts = [grid.as_entries(units, values)[::-1] for (values, units), grid in zip(parts, grids, strict=True)]
        cut = {"granularity": "entry", "block_size": 0}
    return united(parts) | cut


def united(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> dict:
    """Units that several adapters hold become one unit with the sum of their values; autograd splits it again."""
    united, owner = torch.unique(torch.cat([units for _, units in parts]), return_inverse=True)
    stacked = torch.cat([values for values, _ in parts])
    values = stacked.new_zeros(united.numel(), *stacked.shape[1:]).index_add(0, owner, stacked)
    return {"values": values, "units": united}


def _with_subnets(layer: SparseLoraLayer, names: list[str]) -> dict:
    """One subnet as it is; several, or one beside supports, as entries."""
    if len(names) == 1:
        rows, columns = layer.subnet(names[0])
        values = layer.subnet_values(names[0])
        return {"values": values, "live_rows": rows, "live_columns": columns, "granularity": "subnet"}
    parts = [layer.sparse_entries(name)[::-1] for name in names]
    return united(parts) | {"granularity": "entry", "block_size": 0}


def is_idle(layer: SparseLoraLayer, name: str) -> bool:
    """Whether a support awaits calibration and nobody reads gradients or trains a dense delta in its place."""
    # In this order: compiled graphs are guarded by what they look at, and readers come and go.
    if not layer.awaits_calibration(name):
        return False
    return name not in layer.sparse_lora_dense_delta and name not in layer.sparse_lora_gradient_readers


def _with_dense_deltas(layer: SparseLoraLayer, names: list[str]) -> dict:
    """All rows as one support: the sum of the dense deltas and of the other adapters' updates."""
    total: torch.Tensor | None = None
    for name in names:
        part = layer.sparse_lora_dense_delta.get(name)
        if part is None:
            positions, values = layer.sparse_entries(name)
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
