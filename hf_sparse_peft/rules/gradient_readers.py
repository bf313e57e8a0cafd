"""Gradients that a layer's backward pass lends to its readers: one sum a micro-batch, however often the layer ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops import read_units
from ..sparsity import UnitGrid
from .collectives import all_reduce_mean, all_reduce_means, is_distributed
from .dense_means import DenseMeans


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

    means: DenseMeans | None = None
    """What averages over ranks the dense gradients that it chooses by; set by `Run.read_gradient`."""
    ran = False
    """Whether the layer ran in this micro-batch."""

    def __init__(self) -> None:
        self._uses = UsesOfLayer()

    def expect(self) -> None:
        """The layer runs once more in this micro-batch."""
        self._uses.expect()
        self.ran = self.ran or self._uses.expected > 0

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

    def step_share(self) -> Tensor | None:
        """This rank's part of what the reader averages over ranks when the step is complete, `finish_step` apart: the
        caller averages it in place, with those of other readers. None: nothing, on any rank."""
        return None

    def finish_step(self, loss_scale: float = 1.0) -> None:
        """Close an optimizer step's accumulation; the gradients were multiplied by `loss_scale`."""
        self.finish_micro_batch()


def finish_steps(readers: Iterable[Any], loss_scale: float) -> None:
    """`finish_step` of all `readers`; what they average over ranks travels together (`all_reduce_means`)."""
    readers = list(readers)
    shares = [reader.step_share() for reader in readers if hasattr(reader, "step_share")]
    all_reduce_means([one for one in shares if one is not None])
    for reader in readers:
        reader.finish_step(loss_scale)


class StepSumReader(MicroBatchReader):
    """`total`, fp64: the sum of `measure(dense)` over the step, `dense` the whole step's gradient divided by the loss
    scale: exact for what is homogeneous in the gradient, as |products| are. Several micro-batches need an fp32 sum of
    the gradient.

    Args:
        micro_batches: of an optimizer step.
        measure: takes a dense gradient `[rows, cols]`, returns a 0-dim tensor.
    """

    def __init__(self, micro_batches: int, measure: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.measure, self.sums_dense = measure, micro_batches > 1
        self.total = 0.0
        self._dense: Tensor | None = None

    def take_whole(self, dense: Tensor) -> None:
        """Measure, or add to the step's gradient."""
        if not self.sums_dense:
            self.total = self.total + self.measure(dense).double()
        else:
            self._dense = dense.to(torch.float32, copy=True) if self._dense is None else self._dense.add_(dense)

    @torch.no_grad()
    def finish_step(self, loss_scale: float = 1.0) -> None:
        """Measure what was summed."""
        self.finish_micro_batch()
        if self._dense is not None:
            self.total, self._dense = self.measure(self._dense).double(), None
        self.total = self.total / loss_scale


class StepGradientReader(MicroBatchReader):
    """Hands the gradient of a whole step, divided by the loss scale and averaged over ranks, to `take` once: as it was
    lent where one micro-batch is the step, else, and over several ranks, an fp32 sum.

    Args:
        micro_batches: of an optimizer step.
        loss_scale: what the step's gradients are multiplied by.
        shape: of the weight.
        device: where a rank that no gradient reached makes zeros.
        take: called with the gradient `[rows, cols]`, to be read at once; not where nothing arrived.
    """

    def __init__(
        self,
        micro_batches: int,
        loss_scale: float,
        shape: tuple[int, int],
        device: torch.device,
        take: Callable[[Tensor], None],
    ) -> None:
        super().__init__()
        self.loss_scale, self.shape, self.device, self.take_step = loss_scale, shape, device, take
        self.sums_dense = micro_batches > 1 or is_distributed()
        self._dense: Tensor | None = None

    def take_whole(self, dense: Tensor) -> None:
        """Hand it on, or add it to the step's."""
        if self.sums_dense:
            self._dense = dense.to(torch.float32, copy=True) if self._dense is None else self._dense.add_(dense)
        else:
            self.take_step(dense if self.loss_scale == 1 else dense / self.loss_scale)

    @torch.no_grad()
    def finish_step(self, loss_scale: float = 1.0) -> None:
        """Hand the sum on."""
        self.finish_micro_batch()
        if self._dense is None and self.sums_dense and is_distributed():
            self._dense = torch.zeros(self.shape, device=self.device)  # another rank's batches may have reached it
        if self._dense is not None:
            dense, self._dense = all_reduce_mean(self._dense), None
            self.take_step(dense.div_(loss_scale))


class SharedReader:
    """The readers of one layer's gradient as one: a single product serves all of them, and none owns its result.

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
        own = self.block_size if self.granularity in ("block", "diagonal") else 0
        return grid is not None and (grid.granularity, grid.cut_size) == (self.granularity, own)


def _wanted(reader: Any) -> Tensor | None:
    return reader.wanted_units() if hasattr(reader, "wanted_units") else None
