"""`FrobeniusDecay`: weight decay on the product of low-rank factors instead of on the factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..utils.option_types import PositiveFloat
from ..utils.parts import register_part
from .rule import Rule
from .run import Run


@register_part("frobenius_decay")
@dataclass(frozen=True)
class FrobeniusDecay(Rule):
    r"""Adds the gradient of :math:`\frac{\lambda}{2}\|B\,\mathrm{diag}(g)\,A\|_F^2` to the factors', once per optimizer
    step, after clipping (Khodak et al., 2021, "Initialization and Regularization of Factorized Neural Layers"; used by
    Cuttlefish). It never shows in the loss.

    :math:`\partial / \partial B = \lambda P A A^\top \mathrm{diag}(g)` and :math:`\partial / \partial A = \lambda
    P^\top P A` with :math:`P = B\,\mathrm{diag}(g)`; nothing of the size of the weight is built. It stands in for
    weight decay: optimizers that this package makes give the factors none.
    """

    weight: PositiveFloat = 1e-4
    r""":math:`\lambda`."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank", "factors"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})
    undecayed: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add the gradient, in the units that the loss's has."""
        scale = run.gradient_scale * self.weight
        for space in run.spaces():
            A, B = space.A, space.B
            gate = B.new_ones(B.shape[1]) if space.gate is None else space.gate.reshape(-1)
            P = B * gate
            if B.grad is not None:
                B.grad.add_((P @ (A @ A.t())) * gate, alpha=scale)
            if A.grad is not None:
                A.grad.add_((P.t() @ P) @ A, alpha=scale)
