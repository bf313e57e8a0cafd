"""GQSA's pruning: groups of neighbours along the inputs go together, by their Hessian saliency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...sparsity import lowest_of_rows
from ...utils.option_types import NonNegativeFloat, PositiveFloat, PositiveInt
from ...utils.parts import register_part
from ..reading.input_statistics import HESSIAN, InputStatistics
from .one_shot_methods import PruningMethod
from .pruning_patterns import PruningPattern


@register_part("groups")
@dataclass(frozen=True)
class Groups(PruningPattern):
    """Groups of `size` neighbours along the inputs, aligned to it, are kept or go as one, by the mean of their entries'
    scores: exactly `int(sparsity * n)` of the `n` groups that compete (GQSA's 1 x G; Zeng et al., 2025)."""

    size: PositiveInt = 16
    """Entries of a group (GQSA: 16)."""
    group: Literal["row", "layer"] | None = None
    """Groups of each output row compete, or all of a weight. None: as the criterion has it."""

    def check(self, rows: int, cols: int, name: str) -> None:
        """Raises `ValueError` where groups run over the end of a row."""
        if cols % self.size:
            raise ValueError(
                f"pattern={self}: groups of {self.size} do not divide the {cols} inputs of '{name}'. Choose another "
                "size, or name the module in exclude_modules."
            )

    def removed(self, scores: Tensor, sparsity: float, group: str) -> Tensor:
        """See `PruningPattern`."""
        if scores.shape[1] % self.size:
            raise ValueError(
                f"{self} cuts {scores.shape[1]} columns at a time into groups of {self.size}, which do not divide "
                "them. Take a SparseGPT.block that is a multiple of the size."
            )
        means = scores.reshape(len(scores), -1, self.size).mean(2)
        grouped = means if (self.group or group) == "row" else means.reshape(1, -1)
        gone = lowest_of_rows(grouped, int(grouped.shape[1] * sparsity)).view(means.shape)
        return gone.repeat_interleave(self.size, 1)


@register_part("gqsa")
@dataclass(frozen=True)
class GQSA(PruningMethod):
    r"""Groups with the smallest mean of :math:`w_{ij}^2 / [H^{-1}]_{jj}^p` go, those of an output row competing (GQSA;
    Zeng et al., 2025). Meant for `Groups(16)`; other patterns take the entries' scores as they are.

    :math:`H = \frac2N \sum_t x_t x_t^\top + \lambda I`, with `damping` times the mean of its diagonal as
    :math:`\lambda`; its inverse in float64. Weights that stay do not change. The paper goes on from there: a
    `FactoredConfig(form=GroupBits(), keep_base=True)` rounds the groups that are kept to 4 bits, `reconstruct` trains
    weights, scales and zero points block by block (BQPO), and `pack_groups()` leaves scales and zero points to train on
    the loss of the whole model (E2E-OQP).
    """

    power: PositiveFloat = 2.0
    """p: 2 as printed; 1 is optimal brain damage's loss."""
    damping: NonNegativeFloat = 0.01
    """What is added to H's diagonal, as a fraction of its mean."""

    reads: ClassVar[frozenset[str]] = frozenset({HESSIAN})
    group: ClassVar[str] = "row"

    def scores(self, weight: Tensor, inputs: InputStatistics, name: str, seed: int) -> Tensor:
        """See the class. Raises `ValueError` for an H that has no inverse."""
        hessian = inputs.hessian().double()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        hessian.diagonal().add_(self.damping * hessian.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed or not lower.isfinite().all():
            raise ValueError(
                f"GQSA: the inputs of '{name}' are not finite, or so alike that H has no inverse. Raise damping="
                f"{self.damping}, or calibrate with more tokens than the {len(hessian)} inputs."
            )
        inverse = torch.cholesky_inverse(lower).diagonal()
        scores = weight.double().square() / inverse.pow(self.power)
        return scores.masked_fill(dead, 0).to(weight.dtype)
