"""Where the frozen weight of one product comes from. The weight itself is only ever read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .entries import EntryIndex
from .subgrid import read_subgrid, write_subgrid_
from .units import read_units, write_units_


@dataclass(frozen=True)
class Support:
    """Units of a weight and what is added there: `units` int32/int64 `[k]`, sorted and distinct (entries: their
    `EntryIndex`); `values` fp32.

    A subnet has `live_rows` `[R]` and `live_columns` `[C]` in place of units, and values `[R, C]`.
    """

    units: torch.Tensor | EntryIndex | None
    values: torch.Tensor
    granularity: str
    block_size: int = 0
    live_rows: torch.Tensor | None = None
    live_columns: torch.Tensor | None = None

    def compacted(self, dtype: torch.dtype) -> Support:
        """Entries of a known sub-grid as that sub-grid: a subnet whose other values are zero."""
        rows, columns = self.units.live_rows, self.units.live_columns
        dense = self.values.new_zeros(rows.numel() * columns.numel(), dtype=dtype)
        dense.index_copy_(0, self.units.inside, self.values.to(dtype))
        return Support(None, dense.view(rows.numel(), -1), "subnet", 0, rows, columns)

    def written_into(self, weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """`weight`, overwritten at the support by `total`, of the values' shape, in the weight's dtype."""
        if self.granularity == "subnet":
            return write_subgrid_(weight, self.live_rows, self.live_columns, total.to(weight.dtype))
        return write_units_(weight, self.units, total.to(weight.dtype), self.granularity, self.block_size)

    def read(self, weight: torch.Tensor) -> torch.Tensor:
        """What `weight` has at the support, laid out as the values are, in the weight's dtype."""
        if self.granularity == "subnet":
            return read_subgrid(weight, self.live_rows, self.live_columns)
        return read_units(weight, self.units, self.granularity, self.block_size)


@dataclass(frozen=True)
class DenseSource:
    """A dense frozen weight of a layer, `[rows, cols]` or its transpose in memory (`transposed`)."""

    weight: torch.Tensor
    transposed: bool = False

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The `[rows, cols]` weight in `dtype`, in the layer's own memory where the dtypes agree: not to be changed."""
        weight = self.weight.detach()
        return (weight.t() if self.transposed else weight).to(dtype)

    def with_support(self, support: Support, dtype: torch.dtype) -> torch.Tensor:
        """A copy of the `[rows, cols]` weight with the support added, summed in fp32 or more, rounded once."""
        weight = self.read(self.weight.dtype)
        return support.written_into(weight.to(dtype, copy=True), support.read(weight) + support.values)


@dataclass(frozen=True)
class DequantizedSource:
    """A quantised weight: `dequantize(dtype)` returns a fresh `[rows, cols]` buffer at every call."""

    dequantize: Callable[[torch.dtype], torch.Tensor]
    weight: torch.Tensor | None = None
    """What is dequantised, to notice when it changes between a forward and its backward pass."""

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight in `dtype`, in memory of its own."""
        return self.dequantize(dtype)

    def with_support(self, support: Support, dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight with the support added in fp32, rounded once."""
        weight = self.dequantize(dtype)
        return support.written_into(weight, support.read(weight) + support.values)


Source = DenseSource | DequantizedSource


def shifted(source: Source, shifts: Sequence[torch.Tensor]) -> DequantizedSource:
    """`source` with the frozen matrices `shifts` `[rows, cols]`, at least one, added whenever it is read: summed in the
    widest dtype, rounded once."""
    return DequantizedSource(partial(_read_shifted, source, tuple(shifts)), source.weight)


def _read_shifted(source: Source, shifts: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    # A dense weight is not rounded before the sum.
    total = source.read(source.weight.dtype if isinstance(source, DenseSource) else dtype)
    for shift in shifts:
        total = total + shift
    return total.to(dtype)


def version_of(source: Source | None) -> int | None:
    """How often the weight behind `source` was written to; None where nobody counts (inference tensors)."""
    weight = None if source is None else source.weight
    return None if weight is None or weight.is_inference() else weight._version


def check_version(source: Source | None, version: int | None) -> None:
    """Refuse a backward pass through a weight that is not the one of the forward pass.

    Raises:
        RuntimeError: the weight was changed in place since it had `version`, as autograd says it of saved tensors.
    """
    now = version_of(source)
    if version is not None and now != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: the "
            f"frozen weight [{', '.join(map(str, source.weight.shape))}] of an adapted layer is at version {now}; "
            f"expected version {version} instead. Run backward() before the base weight is edited or merged into."
        )
