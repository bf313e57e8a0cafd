"""Growth candidates of one layer, collected from dense gradients that live for one layer's backward pass only."""

from __future__ import annotations

import torch

from ..ops import read_units
from ..sparsity import top_units
from ..sparsity.scores import chunks_of
from .base import AdaptedLayer, all_reduce_mean

# Gradient entries that are scored at once.
_CHUNK = 1 << 20


class CandidateCollector:
    r"""SpIEL-AG's candidates (Ansell et al., 2024): the units with the largest |gradient| in the first micro-batch of a
    phase, and the sums of their gradients, and of the squares, over the optimizer steps of the phase.

    The chosen units and both sums live in the layer's buffers, `O(k)` numbers that a checkpoint carries; the gradient
    of the current step is kept apart until `finish_step`, so that squares are those of whole optimizer steps, whatever
    the accumulation.
    """

    def __init__(self, part: AdaptedLayer, choose: bool) -> None:
        self.part = part
        self.choose = choose
        """Whether the next gradient starts a phase and decides which units are candidates."""
        self.step_gradient: torch.Tensor | None = None

    @property
    def units(self) -> torch.Tensor:
        """The candidates, sorted; as many as the support has living units."""
        return self.part.layer.sparse_lora_candidates[self.part.adapter][: self.part.units.numel()]

    @property
    def sums(self) -> torch.Tensor:
        """`[2, k, ...]`: sum of gradients, sum of squares."""
        return self.part.layer.sparse_lora_candidate_sums[self.part.adapter][:, : self.part.units.numel()]

    @torch.no_grad()
    def __call__(self, dense: torch.Tensor) -> None:
        """Take one micro-batch's dense gradient `[rows, cols]`."""
        grid = self.part.layer.sparse_lora_grid[self.part.adapter]
        if self.choose:
            self.choose = False
            dense = all_reduce_mean(dense.clone()) if _distributed() else dense
            scores = chunks_of(lambda begin, end: dense[begin:end].float().abs(), grid, _CHUNK)
            chosen = top_units(scores, self.units.numel())
            self.part.layer.sparse_lora_candidate_sums[self.part.adapter].zero_()
            self.units.copy_(chosen)
            gradient = read_units(dense, chosen, grid.granularity, grid.block_size).float()
            # Already the mean over ranks: finish_step averages once more, which changes nothing.
        else:
            gradient = read_units(dense, self.units, grid.granularity, grid.block_size).float()
        self.step_gradient = gradient if self.step_gradient is None else self.step_gradient.add_(gradient)

    @torch.no_grad()
    def finish_step(self, loss_scale: float = 1.0) -> None:
        """Fold the step's summed gradient into the sums; a step that overflowed is left out, as its update is."""
        gradient, self.step_gradient = self.step_gradient, None
        if gradient is None:
            return
        gradient = all_reduce_mean(gradient) / loss_scale
        if torch.isfinite(gradient).all():
            self.sums[0].add_(gradient)
            self.sums[1].add_(gradient.square())


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
