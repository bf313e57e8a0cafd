"""`TrainedRankPruning`: weights are cut to low rank every few steps while they train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.option_types import NonNegativeFloat, PositiveFraction, PositiveInt
from ..utils.parts import register_part
from .collectives import from_first_rank
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("trained_rank_pruning")
@dataclass(frozen=True)
class TrainedRankPruning(Rule):
    r"""Trained rank pruning (TRP; Xu et al., 2020): before every `every`-th step each weight becomes its truncated SVD
    with the fewest components that have `energy` of :math:`\sum \sigma^2`, and the sub-gradient of its nuclear norm,
    :math:`\lambda\, U_k V_k^\top` of that same SVD, is added to the gradient of that step. In between, ranks may grow
    again.

    Published for whole weights (`FactoredConfig(form=Whole())`). A product is cut by
    :math:`B \leftarrow U_k U_k^\top B`: A and the optimizer's state stay, so that components may return. Of a LoRA it
    is the update that is cut; one that is 0, at its start, is passed by.
    """

    every: PositiveInt = 20
    """Optimizer steps between two truncations, of which the first comes before the first step (paper: 20; the official
    script: 5)."""
    energy: PositiveFraction = 0.9
    r"""Fraction of :math:`\sum \sigma^2` that is kept."""
    nuclear_norm: NonNegativeFloat = 3e-4
    r""":math:`\lambda`; 0: no sub-gradient."""
    each_epoch: bool = False
    """Whether steps are counted anew in every epoch, so that its first step truncates (the official code)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"factors", "whole", "rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"values", "gradient"})

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Truncate, if it is time."""
        run.memory.directions = []
        step = run.step % run.interval("TrainedRankPruning.each_epoch", None) if self.each_epoch else run.step
        if step % self.every:
            return
        ranks = {}
        for space in run.spaces():
            U, values, Vh = map(from_first_rank, decomposed(space))
            if not values.any():
                continue
            k = ranks[space.name] = self.rank(values)
            U, Vh = U[:, :k], Vh[:k]
            if k < len(values):
                alive = space.alive()
                space.B.data[:, alive] = (U @ (U.t() @ space.B[:, alive].float())).to(space.B.dtype)
            run.memory.directions.append((space, U, Vh))
        if ranks:
            run.record(rank=sum(ranks.values()) / len(ranks))

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        r"""Add :math:`\lambda\, U_k V_k^\top`, at the steps that truncate."""
        for space, U, Vh in run.memory.directions:
            if self.nuclear_norm:
                add_product_gradient(space, U, Vh, self.nuclear_norm * run.gradient_scale)

    def rank(self, values: Tensor) -> int:
        r"""The fewest of the descending :math:`\sigma` with the energy."""
        energies = values.double().square().cumsum(0)
        return min(1 + int((energies < self.energy * energies[-1]).sum()), int(values.count_nonzero()))


def decomposed(space: UnitSpace) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`U`, :math:`\sigma`, :math:`V^\top` of a product :math:`B\,\mathrm{diag}(g) A`, or of a whole weight (A is
    None), fp32, by the SVD of a core of the size of the rank; zeros where it is not finite."""
    B = space.B.detach().float()  # components that are dead have a gate of 0
    if space.gate is not None:
        B = B * space.gate.detach().reshape(-1)
    if not torch.isfinite(B).all() or (space.A is not None and not torch.isfinite(space.A).all()):
        B = torch.zeros_like(B)  # an SVD of it would raise
    if space.A is None:
        return torch.linalg.svd(B, full_matrices=False)
    (basis_B, core_B), (basis_A, core_A) = torch.linalg.qr(B), torch.linalg.qr(space.A.detach().float().t())
    U, values, Vh = torch.linalg.svd(core_B @ core_A.t(), full_matrices=False)
    return basis_B @ U, values, Vh @ basis_A.t()


def add_product_gradient(space: UnitSpace, left: Tensor, right: Tensor, scale: float) -> None:
    r"""Add to the gradients of A and B (and to those of a gate) what a gradient :math:`s\,L R` of their product,
    `[out, k]` x `[k, in]`, gives them."""
    A, B, gate = space.A, space.B, space.gate
    if A is None:
        if B.grad is not None:
            B.grad.add_((left @ right).to(B.grad), alpha=scale)
        return
    by_A, by_B = right @ A.detach().float().t(), B.detach().float().t() @ left  # R A^T [k, r], B^T L [r, k]
    ones = by_A.new_ones(A.shape[0]) if gate is None else gate.detach().float().reshape(-1)
    if gate is not None and gate.grad is not None:
        gate.grad.add_((by_B * by_A.t()).sum(1).view_as(gate).to(gate.grad), alpha=scale)
    if B.grad is not None:
        B.grad.add_((left @ by_A * ones).to(B.grad), alpha=scale)
    if A.grad is not None:
        A.grad.add_((ones[:, None] * by_B @ right).to(A.grad), alpha=scale)
