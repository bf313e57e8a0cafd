"""`HalfSpace`: groups that a step takes out of their own half-space become 0 (HSPG of Only Train Once)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..utils.option_types import Decay, NonNegativeFloat
from ..utils.parts import register_part
from .evidence import with_gradient
from .groups import groups_held, keep_dead_at_zero, members, places, scale_groups
from .moves import move_units
from .rule import Rule
from .run import Run


@register_part("half_space")
@dataclass(frozen=True)
class HalfSpace(Rule):
    r"""The half-space projected gradient method (HSPG of OTO; Chen et al., 2021): every update has the gradient
    :math:`\nabla f + \lambda\,x_g / \|x_g\|` of each group; from `start` on, a group whose new values `x'` have
    :math:`\langle x'_g, x_g\rangle < \epsilon \|x_g\|^2` is set to 0 and dies for good.

    A group is a unit of a support, or a component of low rank whole: its row of `A`, its column of `B` and its gate, so
    that nothing is left of it in the output. With SGD it is the paper's step; other optimizers take the sum for the
    gradient, which Adam normalises, so that :math:`\lambda` means another thing there. Weight decay is part of the new
    values. Groups that are 0 already (a support's at the start) are not judged; a support keeps one unit. Layers
    without a gradient or held still, groups of which numbers are held still, and skipped steps change nothing.
    """

    weight: NonNegativeFloat = 1e-3
    r""":math:`\lambda` (OTO: 1e-3)."""
    epsilon: Decay = 0.0
    r""":math:`\epsilon`: 0 is the half-space of the group's own direction, more prunes more."""
    start: Decay = 0.25
    """Where projecting begins, as a fraction of the run; the penalty's gradient is there before."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support", "rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "gradient"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    gate: ClassVar[str] = "ones"

    def begin(self, run: Run) -> None:
        """Nothing is to be done yet."""
        run.memory.before, run.memory.fallen = {}, {}

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add the penalty's gradient, and note the values before the update."""
        run.memory.before = {}
        judges = run.step >= round(self.start * run.total_steps)
        for space in with_gradient(run.spaces()):
            if not space.count:
                continue
            parts = list(members(space))
            norms = sum(part.square().sum(1) for part in parts).sqrt()
            at, scale = places(space), run.gradient_scale * self.weight / norms.clamp_min(1e-30)
            scale[norms == 0] = 0
            for (parameter, axis), part in zip(space.parameter_axes(), parts, strict=True):
                if parameter.grad is not None and self.weight:
                    slices = parameter.grad.movedim(axis, 0)
                    pull = (part * scale[:, None]).view_as(slices[at])
                    slices.index_add_(0, at, pull.to(slices.dtype))
            if judges:
                run.memory.before[space] = parts

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Project."""
        run.memory.fallen = {}
        for space, before in run.memory.before.items() if not run.step_skipped else ():
            inner = sum((new * old).sum(1) for new, old in zip(members(space), before, strict=True))
            squares = sum(old.square().sum(1) for old in before)
            gone = (inner < self.epsilon * squares) & (squares > 0) & ~groups_held(run, space)
            if space.packed and gone.all():
                gone[inner.argmax()] = False
            if gone.any():
                scale_groups(space, (~gone).float())
                run.memory.fallen[space] = gone
        run.memory.before = {}
        for space in run.spaces():
            keep_dead_at_zero(space)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Groups that are 0 leave."""
        for space, gone in run.memory.fallen.items():
            move_units(space, space.alive()[~gone.to(space.alive().device)], run.optimizer)
        run.memory.fallen = {}
        run.record_change(alive=sum(space.count for space in run.spaces(training=False)))
