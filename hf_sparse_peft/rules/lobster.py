"""`Lobster`: weight decay where the loss does not mind (LOBSTER)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..utils.option_types import PositiveFloat
from ..utils.parts import register_part
from .rule import Rule
from .run import Run


@register_part("lobster")
@dataclass(frozen=True)
class Lobster(Rule):
    r"""After every update each trained number decays by how little the loss depends on it,
    :math:`w \leftarrow w - \lambda\,w\,\max(0, 1 - |\partial L/\partial w|)` (LOBSTER; Tartaglione et al., 2022).

    `w` is the updated number and the gradient that of this update: the mean over micro-batches and ranks, unscaled, and
    clipped where the run clips (the authors do not: `max_grad_norm=0`). :math:`\lambda` is not multiplied by the
    learning rate. It acts on all parameters of an adapter but those that several modules share; what another rule holds
    still, a module without a gradient, and a step that fp16's scaler skips keep their numbers. `PlateauThreshold`
    beside it is the method's pruning.
    """

    weight: PositiveFloat = 1e-4
    r""":math:`\lambda` (LOBSTER: 1e-4 to 1e-6, by task)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"module"})
    writes: ClassVar[frozenset[str]] = frozenset({"values"})

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Decay what was updated."""
        for space in [] if run.step_skipped else run.spaces():
            trained = [p for p in space.parameters() if p.requires_grad and p.grad is not None]
            if not any(bool(parameter.grad.any()) for parameter in trained):
                continue
            for parameter in trained:
                decay = self.weight * (1 - parameter.grad.abs()).clamp_min_(0)
                held = run.updates.held_numbers(parameter)
                if held is not None:
                    decay.masked_fill_(held, 0)
                parameter.sub_(decay.to(parameter.dtype) * parameter)
