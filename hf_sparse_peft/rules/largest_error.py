"""`LargestError`: a pull on the entry of a low-rank weight that is furthest from the base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..utils.option_types import NonNegativeFloat, PositiveFloat
from ..utils.parts import register_part
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("largest_error")
@dataclass(frozen=True)
class LargestError(Rule):
    r"""Adds the gradient of :math:`w \cdot \frac{1}{L} \sum_l (\max_{ij} |B A - W|_{ij} - \varepsilon)^2` over L
    matrices (PELA's error term; Guo et al., 2024), after clipping. It never shows in the loss.

    A square, as published, and no hinge: an error below :math:`\varepsilon` is pushed up. In each matrix the gradient
    touches one entry of the product. The base weights are read (`keep_base=True`).
    """

    weight: PositiveFloat = 1.0
    """w (Swin, ALBEF: 1; the code's default is 0)."""
    margin: NonNegativeFloat = 1e-3
    r""":math:`\varepsilon`."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"factors"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def check(self, config: Any) -> None:
        """Refuse a base whose weights are gone."""
        super().check(config)
        if not config.keep_base:
            raise ValueError("LargestError compares with the base's weights, and keep_base=False. Set keep_base=True.")

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add the gradient, matrix after matrix."""
        spaces = run.spaces()
        for space in spaces:
            self.add_gradient(space, run.gradient_scale * self.weight / len(spaces))

    def add_gradient(self, space: UnitSpace, scale: float) -> None:
        """Add one matrix's."""
        A, B = space.A, space.B
        product = B.float() if A is None else B.float() @ A.float()
        error = product - space.base_weight().float()
        at = int(error.abs().argmax())
        i, j = divmod(at, error.shape[1])
        found = error[i, j]
        slope = scale * 2 * (found.abs() - self.margin) * found.sign()
        if A is None:
            if B.grad is not None:
                B.grad[i, j] += slope
            return
        if B.grad is not None:
            B.grad[i] += slope * A[:, j]
        if A.grad is not None:
            A.grad[:, j] += slope * B[i]
