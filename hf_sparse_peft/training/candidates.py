"""Growth candidates of one layer, collected from dense gradients that live for one layer's backward pass only."""

from __future__ import annotations

import torch

from ..ops import read_units
from ..rules.collectives import all_reduce_mean, is_distributed
from ..rules.gradient_readers import MicroBatchReader
from ..sparsity import stream_seed, top_units
from ..sparsity.scores import chunks_of
from .base import AdaptedLayer

# Gradient entries that are scored at once.
_CHUNK = 1 << 20


class CandidateCollector(MicroBatchReader):
    r"""SpIEL-AG's candidates (Ansell et al., 2024): the units with the largest |gradient| in the first micro-batch of a
    phase, and the sums of their gradients, and of the squares, over the optimizer steps of the phase.

    The chosen units, both sums and the number of steps in them live in the layer's buffers, `O(k)` numbers that a
    checkpoint carries; the gradient of the current step is kept apart until `finish_step`, so that squares are those
    of whole optimizer steps, whatever the accumulation. Micro-batches whose gradient is 0 everywhere or not finite
    choose nothing, the next one does; steps with a gradient that is not finite, or with none but 0, are in no sum and
    not counted.
    """

    def __init__(self, part: AdaptedLayer, starts: bool = False) -> None:
        super().__init__()
        self.part = part
        self.step_gradient: torch.Tensor | None = None
        self.overflowed = False
        layer, name = part.layer, part.adapter
        # The buffer holds unit + 1, and 0 where there is no candidate: pruning may shrink the support between the
        # choice and the move, and a phase may still be without candidates (an overflow, a file without them).
        self._stored, self._sums = layer.sparse_lora_candidates[name], layer.sparse_lora_candidate_sums[name]
        self._steps = layer.sparse_lora_candidate_steps[name]
        if starts:
            for state in (self._stored, self._sums, self._steps):
                state.zero_()
        self._count = int((self._stored > 0).sum())

    @property
    def units(self) -> torch.Tensor:
        """The candidates, sorted; as many as the support had living units when they were chosen, or none yet."""
        return self._stored[: self._count] - 1

    @property
    def sums(self) -> torch.Tensor:
        """`[2, k, ...]`: sum of gradients, sum of squares."""
        return self._sums[:, : self._count]

    @property
    def steps(self) -> int:
        """Optimizer steps in the sums."""
        return int(self._steps)

    def wanted_units(self) -> torch.Tensor | None:
        """The candidates once they are chosen: the rest of the dense gradient need not be computed then."""
        return self.units if self._count else None

    def take_whole(self, dense: torch.Tensor) -> None:
        """Take one micro-batch's dense gradient, and choose the candidates if that is still to do."""
        grid = self.part.layer.sparse_lora_grid[self.part.adapter]
        if not self._count:
            # Both means over ranks, here and in finish_step: averaging the same numbers again changes nothing.
            dense = all_reduce_mean(dense.clone()) if is_distributed() else dense
            self.overflowed = self.overflowed or not bool(torch.isfinite(dense.sum(dtype=torch.float32)))
            if self.overflowed:
                return  # nothing to rank by: the next step chooses
            if not dense.any():
                return  # no labels in this micro-batch, or none that reach the layer: the next one chooses
            self._choose(dense)
        self.take(read_units(dense, self.units, grid.granularity, grid.block_size))

    @torch.no_grad()
    def take(self, gradient: torch.Tensor) -> None:
        """Take the gradient of the candidates, of one use of the layer."""
        if self.step_gradient is None:
            self.step_gradient = gradient.to(torch.float32, copy=True)
        else:
            self.step_gradient.add_(gradient)

    def _choose(self, dense: torch.Tensor) -> None:
        grid = self.part.layer.sparse_lora_grid[self.part.adapter]
        scores = chunks_of(lambda begin, end: dense[begin:end].float().abs(), grid, _CHUNK)
        seed = stream_seed(self.part.config.seed, "candidates", self.part.name)
        chosen = top_units(scores, self.part.units.numel(), seed=seed)
        self._count = chosen.numel()
        self._stored[: self._count] = chosen + 1

    @torch.no_grad()
    def finish_step(self, loss_scale: float = 1.0) -> None:
        """Fold the step's summed gradient into the sums; a step that overflowed is left out, as its update is."""
        self.finish_micro_batch()
        gradient, self.step_gradient = self.step_gradient, None
        if gradient is None and is_distributed() and self._count:
            gradient = torch.zeros_like(self.sums[0])  # this rank's batches did not reach the layer, another's may
        if gradient is None:
            return
        gradient = all_reduce_mean(gradient) / loss_scale
        if torch.isfinite(gradient).all() and gradient.any():
            self.sums[0].add_(gradient)
            self.sums[1].add_(gradient.square())
            self._steps += 1
