"""`PairOrthogonality`: a pull of the two vectors of 2 x 2 maps to a right angle (qGOFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..utils.option_types import NonNegativeFloat
from ..utils.parts import register_part
from .rule import Rule
from .run import Run


@register_part("pair_orthogonality")
@dataclass(frozen=True)
class PairOrthogonality(Rule):
    r"""Adds the gradient of :math:`\lambda \sum_i \langle \alpha_i, \beta_i \rangle^2` over all pairs of all layers to
    the loss's, once per optimizer step, after clipping: the two vectors of each 2 x 2 map are drawn to a right angle,
    and their norms are free (qGOFT; Ma et al., 2024, section 4.2). It never shows in the loss.

    They are rows here, where the map acts on a layer's input, and columns in the paper, where it acts on the weight's
    inputs, :math:`(R W)^\top x`.

    :math:`\partial / \partial \alpha_i = 2 \lambda \langle \alpha_i, \beta_i \rangle \beta_i`; of :math:`\beta_i`
    likewise.
    """

    weight: NonNegativeFloat = 1e-3
    r""":math:`\lambda` (the paper: 1e-3 on SQuAD and VTAB-1K)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"pair"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add the gradient, in the units that the loss's has."""
        share = 2 * run.gradient_scale * self.weight
        for maps in (parameter for space in run.spaces() for parameter in space.parameters()) if share else ():
            if maps.grad is not None:
                inner = (maps[:, 0] * maps[:, 1]).sum(-1)[:, None, None]
                maps.grad.add_(inner * maps.flip(1), alpha=share)
