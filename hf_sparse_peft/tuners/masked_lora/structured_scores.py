r"""Masks by low-rank and structured scores beside the weight's magnitude (PST; Li et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...sparsity import stream_seed, top_units
from ...utils.option_types import NonNegativeFloat, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .masking import Masking
from .weight import MaskedWeight, masked


@register_part("structured_scores")
@dataclass(frozen=True)
class StructuredScores(Masking):
    r"""The entries with the largest :math:`S = |V| + \alpha_1 A' B' + \alpha_2 (R\,1^\top + 1\,C^\top)` live, in every
    pass anew (PST; Li et al., 2022). As many as rules say (`Prune(space="mask", every=1)`).

    With `V = W + D` `[out, in]`, `A'` `[out, rank]`, `B'` `[rank, in]`, `R` `[out]`, `C` `[in]`, all trained; `A'` is
    N(0, 1), the others start at 0, so that S is the magnitude at first. Gradients are straight-through,
    :math:`dS = G \odot V`, and reach V by its magnitude too, as in the official code:
    :math:`dV = M \odot G + dS \odot \mathrm{sign}(V)`. Ties are drawn for, the same in every pass.
    """

    rank: PositiveInt = 8
    """Rank of the scores' product."""
    low_rank: NonNegativeFloat = 1.0
    r""":math:`\alpha_1`."""
    structured: NonNegativeFloat = 1.0
    r""":math:`\alpha_2`."""

    trained: ClassVar[tuple[str, ...]] = ("score_A", "score_B", "score_rows", "score_columns")
    computes_mask: ClassVar[bool] = True

    def specs(self, config: Any, rows: int, cols: int) -> list[TensorSpec]:
        """The four tensors of the score."""

        def normal(*shape: int) -> Callable[[torch.Generator | None], Tensor]:
            return lambda generator: torch.randn(shape, generator=generator)

        rest = {
            "score_B": (self.rank, cols),
            "score_rows": (rows,),
            "score_columns": (cols,),
        }
        drawn = {name: None if config.init_weights else normal(*shape) for name, shape in rest.items()}
        first = TensorSpec("score_A", (rows, self.rank), start=normal(rows, self.rank))
        return [first, *(TensorSpec(name, shape, start=drawn[name]) for name, shape in rest.items())]

    def scores(self, of: MaskedWeight) -> Tensor:
        """S `[out, in]`."""
        A, B, R, C = (of.tensors[name].detach() for name in self.trained)
        return of.dense.abs() + self.low_rank * (A @ B) + self.structured * (R[:, None] + C)

    def mask(self, of: MaskedWeight) -> Tensor:
        """The `of.count` best."""
        kept = torch.zeros(of.shape, dtype=torch.bool, device=of.dense.device)
        if of.count == kept.numel():
            return kept.fill_(True)
        best = top_units(self.scores(of).reshape(-1), of.count, seed=stream_seed(0, "scores", of.name))
        kept.view(-1)[best.long()] = True
        return kept

    def weight_gradient(self, of: MaskedWeight, gradient: Tensor, mask: Tensor) -> Tensor:
        r""":math:`M \odot G + G \odot |V|`."""
        return masked(gradient, mask) + gradient * of.dense.abs()

    def gradients(self, of: MaskedWeight, gradient: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Those of the scores' tensors, from dS."""
        A, B = of.tensors["score_A"], of.tensors["score_B"]
        dS = gradient * of.dense
        return {
            "score_A": self.low_rank * dS @ B.t(),
            "score_B": self.low_rank * A.t() @ dS,
            "score_rows": self.structured * dS.sum(1),
            "score_columns": self.structured * dS.sum(0),
        }
