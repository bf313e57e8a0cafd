"""The two unit spaces of a subnet: its rows and its columns, which move independently."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...rules import UnitSpace
from .subnet import COLUMNS, ROWS


@dataclass(frozen=True)
class WeightSpace(UnitSpace):
    """Units that are parts of one weight."""

    def base_weight(self) -> Tensor:
        """The base weight `[out, in]`, dequantised if need be; not to be written to."""
        return self.layer.dense_base_weight()

    def current_weight(self) -> Tensor:
        """A new fp32 tensor `[out, in]`: the base weight plus the adapter's update."""
        weight = self.base_weight().detach().to(torch.float32, copy=True)
        self.layer._add_delta_(weight, self.adapter)
        return weight


@dataclass(frozen=True)
class _SubnetSide(WeightSpace):
    side: ClassVar[int]
    buffer: ClassVar[str]

    @property
    def values(self) -> nn.Parameter:
        """`[R, C]`."""
        return self.layer.sparse_lora_subnet[self.adapter]

    @property
    def size(self) -> int:
        """Rows or columns of the weight."""
        return self.weight_shape[self.side]

    @property
    def capacity(self) -> int:
        """Those of the subnet, which all live."""
        return self.values.shape[self.side]

    @property
    def unit_numel(self) -> int:
        """Entries of one: where the subnet's lines of the other side cross it."""
        return self.values.shape[1 - self.side]

    def alive(self) -> Tensor:
        """The subnet's, sorted."""
        return self.layer.subnet(self.adapter)[self.side]

    @property
    def count(self) -> int:
        """All that the subnet has."""
        return self.capacity

    def version(self) -> Hashable:
        """Identity and version of the buffer that holds them."""
        codes = getattr(self.layer, self.buffer)[self.adapter]
        return id(codes), 0 if codes.is_inference() else codes._version

    def parameters(self) -> list[nn.Parameter]:
        """The values."""
        return [self.values]

    def parameter_axes(self) -> list[tuple[nn.Parameter, int]]:
        """Rows lie along the first axis of the values, columns along the second."""
        return [(self.values, self.side)]

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """The values."""
        return {"values": (self.values, self.side)}

    def changed_entries(self) -> int:
        """Entries of the weight that the subnet changes, or has changed where it was before."""
        return int(self.layer.pieces(self.adapter)[-1].entries()[1].count_nonzero())

    def accumulate(self) -> None:
        """Move what the values have learned into the accumulator: the update stays, the values are 0."""
        self.layer.accumulate_subnet(self.adapter)

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raises `ValueError` where a rule needs an accumulator that the layer does not have."""
        if "accumulator" in needs and self.adapter not in self.layer.sparse_lora_accumulator:
            raise ValueError(
                f"The subnet of '{self.name}' has no accumulator to keep what it leaves behind. Name the rule in the "
                "config's schedule, or set accumulator=True in the config."
            )


@dataclass(frozen=True)
class SubnetRows(_SubnetSide):
    """Rows of a subnet."""

    kind: ClassVar[str] = "subnet_row"
    unit: ClassVar[str] = "row"
    side: ClassVar[int] = 0
    buffer: ClassVar[str] = ROWS

    @property
    def unit_entries(self) -> int:
        """Entries of one."""
        return self.unit_numel

    def gather(self, dense: Tensor) -> Tensor:
        """`[R, C]`, what `dense` holds at the subnet."""
        rows, columns = self.layer.subnet(self.adapter)
        return dense.index_select(0, rows).index_select(1, columns)

    def write(self, units: Tensor) -> None:
        """Make `units` the rows."""
        self.layer.write_subnet(self.adapter, rows=units)


@dataclass(frozen=True)
class SubnetColumns(_SubnetSide):
    """Columns of a subnet; its entries are counted as those of its rows."""

    kind: ClassVar[str] = "subnet_column"
    unit: ClassVar[str] = "column"
    side: ClassVar[int] = 1
    buffer: ClassVar[str] = COLUMNS

    def gather(self, dense: Tensor) -> Tensor:
        """`[C, R]`, what `dense` holds at the subnet."""
        rows, columns = self.layer.subnet(self.adapter)
        return dense.index_select(0, rows).index_select(1, columns).t()

    def write(self, units: Tensor) -> None:
        """Make `units` the columns."""
        self.layer.write_subnet(self.adapter, columns=units)
