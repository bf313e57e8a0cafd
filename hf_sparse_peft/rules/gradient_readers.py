"""Gradients that a layer's backward pass lends to its readers: one sum a micro-batch, however often the layer ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..ops import read_units
from ..sparsity import Everywhere, Region, UnitGrid, excluding, stream_seed, top_units
from ..sparsity.scores import Chunks, chunks_of
from .collectives import all_reduce_mean, all_reduce_means, is_distributed
from .dense_means import DenseMeans
from .space import UnitSpace

# Gradient entries that are scored at once.
_CHUNK = 1 << 20


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


class ChoosingReader(MicroBatchReader):
    """Base of the readers that choose units of `space` by the mean over ranks of a micro-batch's dense gradient, and
    follow these alone from then on."""

    space: UnitSpace

    @property
    def chooses(self) -> bool:
        """Whether the units are still to choose; the same on every rank."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """Of the dense gradient."""
        return self.space.grid.rows, self.space.grid.cols

    @property
    def device(self) -> torch.device:
        """Of the dense gradient."""
        return self.space.values.device

    def over_ranks(self, dense: Tensor) -> Tensor | None:
        """The mean of `dense`, itself where nothing is distributed; None: `take_mean` gets it later."""
        if not is_distributed():
            return dense
        return all_reduce_mean(dense.clone()) if self.means is None else self.means.mean(self, dense)

    def take_mean(self, dense: Tensor) -> None:
        """Take the mean over ranks of a micro-batch's gradient, which this rank may have had no part in."""
        raise NotImplementedError


class CandidateReader(ChoosingReader):
    r"""SpIEL-AG's candidates (Ansell et al., 2024): the units with the largest |gradient| in the first micro-batch of a
    phase, and the sums of their gradients, and of the squares, over the optimizer steps of the phase.

    The chosen units, both sums and the number of steps in them live in the rule's state, `O(k)` numbers that a
    checkpoint carries; the gradient of the current step is kept apart until `finish_step`, so that squares are those
    of whole optimizer steps, whatever the accumulation. Micro-batches whose gradient is 0 everywhere or not finite
    choose nothing, the next one does; steps with a gradient that is not finite, or with none but 0, are in no sum and
    not counted.

    Args:
        space: a support with the state `candidates` (`[k]`, unit + 1, 0 where there is none), `candidate_sums`
            (`[2, k, ...]` fp32) and `candidate_steps` (`[1]` int32).
        starts: whether a phase begins: forget the last one's.
        region: takes score chunks of all units, returns where candidates may lie (`Move.region`); None: anywhere.
    """

    def __init__(
        self, space: UnitSpace, starts: bool = False, region: Callable[[Chunks], Region] | None = None
    ) -> None:
        super().__init__()
        self.region = region
        self.space = space
        self.step_gradient: Tensor | None = None
        self._averaged = False
        self.overflowed = False
        state = space.state()
        # unit + 1, and 0 where there is no candidate: pruning may shrink the support between the choice and the move,
        # and a phase may still be without candidates (an overflow, a file without them).
        self._stored, self._sums, self._steps = (
            state[name] for name in ("candidates", "candidate_sums", "candidate_steps")
        )
        if starts:
            for tensor in (self._stored, self._sums, self._steps):
                tensor.zero_()
        self._count = int((self._stored > 0).sum())

    @property
    def units(self) -> Tensor:
        """The candidates, sorted; as many as the support had living units when they were chosen, or none yet."""
        return self._stored[: self._count] - 1

    @property
    def sums(self) -> Tensor:
        """`[2, k, ...]`: sum of gradients, sum of squares."""
        return self._sums[:, : self._count]

    @property
    def steps(self) -> int:
        """Optimizer steps in the sums."""
        return int(self._steps)

    def wanted_units(self) -> Tensor | None:
        """The candidates once they are chosen: the rest of the dense gradient need not be computed then."""
        return self.units if self._count else None

    @property
    def chooses(self) -> bool:
        """Until there are candidates."""
        return not self._count

    def take_whole(self, dense: Tensor) -> None:
        """Take one micro-batch's dense gradient, and choose the candidates if that is still to do."""
        if not self._count:
            # Both means over ranks, here and in step_share: averaging the same numbers again changes nothing.
            dense = self.over_ranks(dense)
        if dense is not None:
            self.take_mean(dense)

    def take_mean(self, dense: Tensor) -> None:
        """Choose by it if that is still to do, and take the candidates' part."""
        grid = self.space.grid
        if not self._count:
            self.overflowed = self.overflowed or not bool(torch.isfinite(dense.sum(dtype=torch.float32)))
            if self.overflowed:
                return  # nothing to rank by: the next step chooses
            if not dense.any():
                return  # no labels in this micro-batch, or none that reach the layer: the next one chooses
            self._choose(dense)
        self.take(read_units(dense, self.units, grid.granularity, grid.block_size))

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Take the gradient of the candidates, of one use of the layer."""
        if self.step_gradient is None:
            self.step_gradient = gradient.to(torch.float32, copy=True)
        else:
            self.step_gradient.add_(gradient)

    def _choose(self, dense: Tensor) -> None:
        scores = chunks_of(lambda begin, end: dense[begin:end].float().abs(), self.space.grid, _CHUNK)
        if self.region is not None:
            scores = self.region(scores).masked(scores)
        seed = stream_seed(self.space.seed, "candidates", self.space.name)
        chosen = top_units(scores, self.space.count, seed=seed)
        self._count = chosen.numel()
        self._stored[: self._count] = chosen + 1

    @torch.no_grad()
    def step_share(self) -> Tensor | None:
        """The candidates' gradients."""
        self.finish_micro_batch()
        if self.step_gradient is None and is_distributed() and self._count:
            # This rank's batches did not reach the layer, another's may.
            self.step_gradient = torch.zeros_like(self.sums[0])
        self._averaged = True
        return self.step_gradient

    @torch.no_grad()
    def finish_step(self, loss_scale: float = 1.0) -> None:
        """Fold the step's summed gradient into the sums; a step that overflowed is left out, as its update is."""
        if not self._averaged:
            all_reduce_means([one for one in [self.step_share()] if one is not None])
        gradient, self.step_gradient, self._averaged = self.step_gradient, None, False
        if gradient is None:
            return
        gradient = gradient / loss_scale
        if torch.isfinite(gradient).all() and gradient.any():
            self.sums[0].add_(gradient)
            self.sums[1].add_(gradient.square())
            self._steps += 1


class StepReader(ChoosingReader):
    r"""Reads one layer's dense gradient at the step of a move, summed over micro-batches and averaged over ranks (RigL;
    Evci et al., 2020).

    Kept: the gradients of all trained units, and of the `count` untrained ones where they are largest. Whatever the
    drop decides afterwards, the best untrained or just dropped units are among these, so the growth equals one over
    every inactive unit. With one micro-batch the dense gradient lives for one layer's backward pass. With several, an
    exact sum needs one fp32 gradient of every adapted weight until the step ends; with `factor` the `factor * count`
    best untrained units of the first micro-batch are followed instead. Only untrained units in `region` of the scores
    (`Move.region`; None: anywhere) are.
    """

    def __init__(
        self,
        space: UnitSpace,
        count: int,
        micro_batches: int,
        factor: float | None,
        region: Callable[[Chunks], Region] | None = None,
    ) -> None:
        super().__init__()
        self.region = region
        self.space, self.count = space, count
        self.trained = space.trained_units()
        self.sums_dense = micro_batches > 1 and factor is None
        self.limit = count if factor is None else int(factor * count)
        self.units: Tensor | None = None
        """The units that can matter, sorted; None before they are chosen, and after an overflow."""
        self.gradients: Tensor | None = None
        self._dense: Tensor | None = None
        self._averaged = self._overflowed = False

    def wanted_units(self) -> Tensor | None:
        """The followed units once they are chosen: the rest of the dense gradient need not be computed then."""
        return self.units

    @torch.no_grad()
    def __call__(self, dense: Tensor) -> None:
        """Take the dense gradient `[rows, cols]` of one use of the layer."""
        if self.sums_dense:
            self._dense = dense.to(torch.float32, copy=True) if self._dense is None else self._dense.add_(dense)
            return
        super().__call__(dense)

    @property
    def chooses(self) -> bool:
        """Until units are followed; not where the whole step's gradient is summed."""
        return not self.sums_dense and self.units is None

    def take_whole(self, dense: Tensor) -> None:
        """Choose from one micro-batch's gradient."""
        dense = self.over_ranks(dense)
        if dense is not None:
            self.take_mean(dense)

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Take the gradient of the followed units, of one use of the layer."""
        self.gradients.add_(gradient)

    @torch.no_grad()
    def step_share(self) -> Tensor | None:
        """The followed units' gradients; dense ones travel alone."""
        self.finish_micro_batch()
        self._averaged = True
        return None if self.sums_dense else self.gradients

    @torch.no_grad()
    def finish_step(self, loss_scale: float = 1.0) -> None:
        """Close the step's accumulation; a loss scale changes no rank and stays in the gradients."""
        if not self._averaged:
            all_reduce_means([one for one in [self.step_share()] if one is not None])
        self._averaged = False
        if self._dense is None and self.sums_dense and is_distributed():
            # This rank's batches did not reach the layer, another's may.
            grid = self.space.grid
            self._dense = torch.zeros(grid.rows, grid.cols, device=self.space.values.device)
        if self._dense is not None:
            self.take_mean(all_reduce_mean(self._dense))
            self._dense = None
        if self.gradients is not None and not bool(torch.isfinite(self.gradients).all()):
            self.units = None  # an overflow: there is nothing to rank by, and the step is left out anyway

    def take_mean(self, dense: Tensor) -> None:
        """Choose by it."""
        if self._overflowed or not bool(torch.isfinite(dense.sum(dtype=torch.float32))):
            self._overflowed = True
            return
        if not dense.any():
            return  # no labels in it, or none that reach the layer: a later micro-batch may choose
        grid = self.space.grid
        scores = chunks_of(lambda begin, end: dense[begin:end].float().abs(), grid, _CHUNK)
        region = Everywhere(grid) if self.region is None else self.region(scores)
        limit = min(self.limit, region.size - int(region.contains(self.trained).sum()))
        seed = stream_seed(self.space.seed, "step gradient", self.space.name)
        best = top_units(excluding(region.masked(scores), self.trained), limit, seed=seed).to(self.trained.dtype)
        self.units = torch.cat([self.trained, best]).sort().values
        self.gradients = read_units(dense, self.units, grid.granularity, grid.block_size).float()
