"""Readers of gradients that choose by them which units come: candidates, whose gradients they sum afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops import read_units
from ..sparsity import Everywhere, Region, excluding, stream_seed, top_units
from ..sparsity.scores import Chunks, chunks_of
from .collectives import all_reduce_mean, all_reduce_means, is_distributed
from .gradient_readers import MicroBatchReader
from .space import UnitSpace

# Gradient entries that are scored at once.
_CHUNK = 1 << 20


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
