"""`ScoredMask`: a mask by trained scores (movement pruning, SMP)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .masking import Masking
from .weight import MaskedWeight

SCORES = ("scores", "score_factors")


@register_part("scored")
@dataclass(frozen=True)
class ScoredMask(Masking):
    r"""Scores `S` `[out, in]` train beside the mask, straight through it: :math:`dS = G \odot V` with the dense
    gradient :math:`G = dY^\top X`, for kept and removed entries alike; :math:`dV = M \odot G` (movement pruning; Sanh
    et al., 2020). The rule `LearnMask` makes the mask of them, and drops them when training ends: what is shipped is a
    bit an entry.

    Dense scores take four to eight times the memory of a 4-bit base, and with Adam three times that. With `rank` they
    are low-rank, :math:`S = P Q`, `P` `[out, rank]` from 0 and `Q` `[rank, in]` Kaiming-uniform, and get
    :math:`dP = dS\,Q^\top`, :math:`dQ = P^\top dS`.
    """

    rank: PositiveInt | None = None
    """Rank of the scores; None, as published: a number an entry."""

    trained: ClassVar[tuple[str, ...]] = SCORES
    for_training: ClassVar[tuple[str, ...]] = SCORES

    def specs(self, config: Any, rows: int, cols: int) -> list[TensorSpec]:
        """`scores`, which is P of low-rank ones, and `score_factors`, Q."""
        if self.rank is None:
            return [TensorSpec("scores", (rows, cols))]
        return [
            TensorSpec("scores", (rows, self.rank)),
            TensorSpec("score_factors", (self.rank, cols), start=_drawn(self.rank, cols)),
        ]

    def scores(self, tensors: dict[str, Tensor]) -> Tensor:
        """S `[out, in]`."""
        return tensors["scores"] if self.rank is None else tensors["scores"] @ tensors["score_factors"]

    def score_gradients(self, tensors: dict[str, Tensor], gradient: Tensor) -> dict[str, Tensor]:
        """The gradients of the tensors from that of S."""
        if self.rank is None:
            return {"scores": gradient}
        P, Q = tensors["scores"], tensors["score_factors"]
        return {"scores": gradient @ Q.t(), "score_factors": P.t() @ gradient}

    def gradients(self, of: MaskedWeight, gradient: Tensor, mask: Tensor) -> dict[str, Tensor]:
        r""":math:`G \odot V`, for S."""
        return self.score_gradients(of.tensors, gradient * of.dense) if "scores" in of.tensors else {}


def _drawn(rows: int, cols: int) -> Callable[[torch.Generator | None], Tensor]:
    return lambda generator: nn.init.kaiming_uniform_(torch.empty(rows, cols), a=math.sqrt(5), generator=generator)
