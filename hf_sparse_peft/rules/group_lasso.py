"""`GroupLasso`: a pull on the last components of low-rank factors, which leave once they are 0 (Maestro)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from ..sparsity import nested_group_slopes, nested_group_threshold
from ..utils.option_types import NonNegativeFloat, PositiveFloat, PositiveInt
from ..utils.parts import register_part
from .evidence import with_gradient
from .moves import move_units
from .rule import RankRule
from .run import Run
from .space import UnitSpace


@register_part("group_lasso")
@dataclass(frozen=True)
class GroupLasso(RankRule):
    r"""Hierarchical group lasso :math:`\lambda \sum_{b=1}^R \|B_{:,b:}\|_F + \|A_{b:}\|_F` of each module (Maestro;
    Horváth et al., 2024), whose nested groups pull component k by k of them. While the last of R components has
    :math:`\|B_{:,R}\|\,\|A_R\| \leq \epsilon` it leaves, so that ranks shrink from their end only.

    The paper decomposes whole layers; on the factors of an adapter, which `SampleRank(modules="one")` orders, it is
    this project's. From the paper, whose code was not found: its values of :math:`\lambda` and of :math:`\epsilon`
    (about 1e-7) are unconfirmed. A layer without a gradient at a step is left alone in it.
    """

    weight: PositiveFloat = 1.0
    r""":math:`\lambda`; the default is this project's. In a step of Adam a column of `B` moves by up to
    :math:`\eta\sqrt{m}`, m its length, and the last of R columns loses up to :math:`R\eta\lambda`."""
    kind: Literal["proximal", "gradient"] = "proximal"
    r"""The proximal operator with :math:`\eta\lambda` after each update, :math:`\eta` the factor's learning rate, which
    reaches 0; or the penalty's gradient, as published, which under Adam needs a `tolerance`."""
    tolerance: NonNegativeFloat = 0.0
    r""":math:`\epsilon`."""
    every: PositiveInt | None = None
    """Optimizer steps between two looks at the last components; None: an epoch."""

    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "gradient", "trains"})
    within: ClassVar[frozenset[str]] = frozenset({"sample_rank"})
    gate: ClassVar[str] = "ones"

    def begin(self, run: Run) -> None:
        """Hold the gates still; an epoch must have a length."""
        run.updates.hold(run, [space.gate for space in run.all_spaces])
        run.memory.every = run.interval("GroupLasso.every", self.every)

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add the penalty's gradient."""
        for space in with_gradient(run.spaces()) if self.kind == "gradient" else ():
            alive = space.alive()
            for factor, axis in _factors(space):
                found = factor.movedim(axis, 0)[alive]
                pull = nested_group_slopes(torch.linalg.vector_norm(found, dim=1))[:, None] * found
                factor.grad.movedim(axis, 0).index_add_(0, alive, pull, alpha=run.gradient_scale * self.weight)

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Note who had evidence, and shrink their factors."""
        judged = [] if run.step_skipped else with_gradient(run.spaces())
        run.memory.judged = [space for space in judged if run.lr(space.B)]
        for space in run.memory.judged if self.kind == "proximal" else ():
            alive = space.alive()
            for factor, axis in _factors(space):
                found, size = factor.data.movedim(axis, 0), self.weight * run.lr(factor)
                norms = torch.linalg.vector_norm(found[alive], dim=1)
                found[alive] *= nested_group_threshold(norms, size)[:, None]

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Let the last components leave that are nothing any more."""
        if run.step % run.memory.every:
            return
        for space in run.memory.judged:
            alive = space.alive()
            (A, _), (B, _) = _factors(space)
            products = torch.linalg.vector_norm(A[alive], dim=1) * torch.linalg.vector_norm(B[:, alive], dim=0)
            left = (products > self.tolerance).nonzero()
            move_units(space, alive[: int(left[-1]) + 1 if left.numel() else 0], run.optimizer)
        run.record_change(alive=sum(space.count for space in run.spaces(training=False)))


def _factors(space: UnitSpace) -> list[tuple[nn.Parameter, int]]:
    return [pair for name, pair in space.scored_parameters().items() if name != "gate"]
