"""`Orthogonality`: a pull of low-rank factors towards orthonormal rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..utils.option_types import NonNegativeFloat
from ..utils.parts import register_part
from .rule import Rule
from .run import Run


@register_part("orthogonality")
@dataclass(frozen=True)
class Orthogonality(Rule):
    r"""Adds the gradient of :math:`\frac{\gamma}{2M}\sum \|AA^\top - I\|_F + \|B^\top B - I\|_F` over the `M` layers
    (AdaLoRA; Zhang et al., 2023) to the factors', once per optimizer step, after clipping. It never shows in the loss.

    :math:`\partial\|AA^\top - I\|_F / \partial A = 2(AA^\top - I)A / \|AA^\top - I\|_F`; B likewise, transposed.
    """

    weight: NonNegativeFloat = 0.5
    """gamma (AdaLoRA: 0.1 to 0.5 by task)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add the gradient, in the units that the loss's has."""
        spaces = run.spaces(training=False)
        share = run.gradient_scale * self.weight / (2 * len(spaces))
        for space in spaces if share else ():
            for factor, rows in ((space.A, space.A), (space.B, space.B.t())):
                if factor.grad is None:
                    continue
                gap = rows @ rows.t() - torch.eye(rows.shape[0], device=rows.device, dtype=rows.dtype)
                direction = (2 * share / gap.norm().clamp_min(1e-12)) * (gap @ rows)
                factor.grad.add_(direction if factor is space.A else direction.t())
