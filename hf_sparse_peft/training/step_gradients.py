"""The dense gradient of one optimizer step, reduced to the units that can matter at the move after it (RigL)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import read_units
from ..rules.collectives import all_reduce_mean, is_distributed
from ..rules.gradient_readers import MicroBatchReader
from ..sparsity import excluding, stream_seed, top_units
from ..sparsity.scores import chunks_of
from .base import AdaptedLayer

# Gradient entries that are scored at once.
_CHUNK = 1 << 20


class StepGradient(MicroBatchReader):
    r"""Reads one layer's dense gradient at the step of a move, summed over micro-batches and averaged over ranks.

    Kept: the gradients of all trained units, and of the `count` untrained ones where they are largest. Whatever the
    drop decides afterwards, the best untrained or just dropped units are among these, so the growth equals one over
    every inactive unit. With one micro-batch the dense gradient lives for one layer's backward pass. With several, an
    exact sum needs one fp32 gradient of every adapted weight until the step ends; with `factor` the `factor * count`
    best untrained units of the first micro-batch are followed instead.
    """

    def __init__(self, part: AdaptedLayer, count: int, micro_batches: int, factor: float | None) -> None:
        super().__init__()
        self.part, self.count = part, count
        self.trained = part.trained_units
        self.sums_dense = micro_batches > 1 and factor is None
        self.limit = count if factor is None else int(factor * count)
        self.units: Tensor | None = None
        """The units that can matter, sorted; None before they are chosen."""
        self.gradients: Tensor | None = None
        self._dense: Tensor | None = None
        self._overflowed = False

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

    def take_whole(self, dense: Tensor) -> None:
        """Choose from one micro-batch's gradient, or add to what is followed."""
        self._reduce(all_reduce_mean(dense.clone()) if is_distributed() else dense)

    @torch.no_grad()
    def take(self, gradient: Tensor) -> None:
        """Take the gradient of the followed units, of one use of the layer."""
        self.gradients.add_(gradient)

    @torch.no_grad()
    def finish(self) -> None:
        """Close the step's accumulation."""
        self.finish_micro_batch()
        if self._dense is None and self.sums_dense and is_distributed():
            # This rank's batches did not reach the layer, another's may.
            layer = self.part.layer
            self._dense = torch.zeros(layer.out_features, layer.in_features, device=self.part.values.device)
        if self._dense is not None:
            self._reduce(all_reduce_mean(self._dense))
            self._dense = None
        elif self.gradients is not None:
            self.gradients = all_reduce_mean(self.gradients)
        if self.gradients is not None and not bool(torch.isfinite(self.gradients).all()):
            self.units = None  # an overflow: there is nothing to rank by, and the step is left out anyway

    def _reduce(self, dense: Tensor) -> None:
        if self._overflowed or not bool(torch.isfinite(dense.sum(dtype=torch.float32))):
            self._overflowed = True
            return
        if not dense.any():
            return  # no labels in it, or none that reach the layer: a later micro-batch may choose
        grid = self.part.layer.sparse_lora_grid[self.part.adapter]
        scores = chunks_of(lambda begin, end: dense[begin:end].float().abs(), grid, _CHUNK)
        limit = min(self.limit, grid.num_units - self.trained.numel())
        seed = stream_seed(self.part.config.seed, "step gradient", self.part.name)
        best = top_units(excluding(scores, self.trained), limit, seed=seed).to(self.trained.dtype)
        self.units = torch.cat([self.trained, best]).sort().values
        self.gradients = read_units(dense, self.units, grid.granularity, grid.block_size).float()
