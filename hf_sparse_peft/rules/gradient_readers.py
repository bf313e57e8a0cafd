"""Gradients that a layer's backward pass lends to its readers: one sum a micro-batch, however often the layer ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import read_units
from ..sparsity import UnitGrid


class UsesOfLayer:
    r"""One layer's dense gradient in one micro-batch, :math:`G = \sum_u dY_u^\top X_u` over its uses `u`.

    A layer that ran once hands its gradient on as it was lent. One that ran several times (shared modules, recurrence)
    keeps an fp32 sum until the last use has come, or until `close` where a use had no gradient.
    """

    def __init__(self) -> None:
        self.expected = 0
        """Uses in the forward pass of this micro-batch."""
        self._seen = 0
        self._sum: Tensor | None = None

    def expect(self) -> None:
        """Count a forward pass of the layer; those that checkpointing repeats inside a backward pass do not count."""
        if torch._C._current_graph_task_id() == -1:
            self.expected += 1

    def add(self, dense: Tensor) -> Tensor | None:
        """Take one use's gradient `[rows, cols]`; the micro-batch's, to be read at once, when all uses have come."""
        self._seen += 1
        if self.expected <= 1:
            self.expected = self._seen = 0
            return dense
        self._sum = dense.to(torch.float32, copy=True) if self._sum is None else self._sum.add_(dense)
        return self.close() if self._seen >= self.expected else None

    def close(self) -> Tensor | None:
        """The sum that still waits for a use, if any; what comes next belongs to another micro-batch."""
        waiting, self._sum = self._sum, None
        self.expected = self._seen = 0
        return waiting


class MicroBatchReader:
    """Base of the readers that take one dense gradient a micro-batch, the sum over a layer's uses, in `take_whole`."""

    def __init__(self) -> None:
        self._uses = UsesOfLayer()

    def expect(self) -> None:
        """The layer runs once more in this micro-batch."""
        self._uses.expect()

    @torch.no_grad()
    def __call__(self, dense: Tensor) -> None:
        """Take the dense gradient `[rows, cols]` of one use of the layer."""
        self._take(self._uses.add(dense))

    @torch.no_grad()
    def finish_micro_batch(self) -> None:
        """Close a micro-batch in which some use of the layer had no gradient."""
        self._take(self._uses.close())

    def _take(self, dense: Tensor | None) -> None:
        if dense is not None:
            self.take_whole(dense)

    def take_whole(self, dense: Tensor) -> None:
        """Take one micro-batch's gradient `[rows, cols]`, lent for the call: keep and change copies only."""
        raise NotImplementedError


class SharedSink:
    """The readers of one layer's gradient as one sink: a single product serves all of them, and none owns its result.

    Args:
        readers: each with the grid of its units, None for one that takes dense gradients only.
        granularity, block_size: how the product cuts the weight into units.
    """

    def __init__(self, readers: list[tuple[Any, UnitGrid | None]], granularity: str, block_size: int) -> None:
        self.readers, self.granularity, self.block_size = readers, granularity, block_size

    def expect(self) -> None:
        """The layer runs once more in this micro-batch."""
        for reader, _ in self.readers:
            if hasattr(reader, "expect"):
                reader.expect()

    def wanted_units(self) -> Tensor | None:
        """Every reader's units; None where one of them needs the dense gradient or cuts the weight in another way."""
        found = [_wanted(reader) for reader, _ in self.readers]
        grids = [grid for _, grid in self.readers]
        if any(units is None for units in found) or not all(self._fits(grid) for grid in grids):
            return None
        return found[0] if len(found) == 1 else torch.unique(torch.cat(found))

    def take(self, gradient: Tensor) -> None:
        """Take the gradient of the wanted units."""
        if len(self.readers) == 1:
            self.readers[0][0].take(gradient)
            return
        everything = self.wanted_units()
        for reader, _ in self.readers:
            reader.take(gradient[torch.searchsorted(everything, reader.wanted_units())])

    def __call__(self, dense: Tensor) -> None:
        """Take the dense gradient `[rows, cols]`."""
        for reader, grid in self.readers:
            units = _wanted(reader)
            if units is None or grid is None:
                reader(dense)
            else:
                reader.take(read_units(dense, units, grid.granularity, grid.block_size))

    def _fits(self, grid: UnitGrid | None) -> bool:
        block = 0 if grid is None or grid.granularity != "block" else grid.block_size
        own = self.block_size if self.granularity == "block" else 0
        return grid is not None and grid.granularity == self.granularity and block == own


def _wanted(reader: Any) -> Tensor | None:
    return reader.wanted_units() if hasattr(reader, "wanted_units") else None
