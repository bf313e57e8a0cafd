"""`GradientProjection`: ranks by the importance of weights, and B by the gradient's projection on A (GoRA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...sparsity import MeanStepGradient, Statistic
from ...utils.option_types import PositiveFloat, PositiveInt
from ...utils.parts import register_part, require
from .starts import Start, Started, StartSite


class Projection(NamedTuple):
    """What is kept of a module's gradient."""

    importance: float
    A: Tensor
    """`[most, cols]`."""
    product: Tensor
    r""":math:`\bar G A^\top` `[rows, most]`."""


@register_part("gradient_projection")
@dataclass(frozen=True)
class GradientProjection(Start):
    r"""Ranks and start of the low-rank half from one estimate of the gradient, :math:`\bar G` (GoRA; He et al., 2025,
    arXiv:2502.12171; official code hhnqqq/MyTransformers).

    Importance :math:`I_l = \mathrm{mean}|W_l \odot \bar G_l|`, budget :math:`Q = \sum_l (m+n)_l\, r_l^0` with the
    config's ranks :math:`r^0`, and

    .. math:: r_l = \mathrm{clip}(\lfloor \mathrm{round}(Q I_l / \textstyle\sum I) / (m+n)_l \rfloor, least, most).

    A is drawn, and the update starts at the gradient's projection on A's rows, whatever `lora_alpha` is:

    .. math:: s B A = \pm\eta \sqrt{n/r}\, \bar G A^\top (A A^\top)^+ A.

    The base is not changed to make up for it, so that the model starts moved. The gradients are read at the pretrained
    weights, in evaluation mode, and what is cut off or filled up by the bounds is not spent elsewhere. A module without
    a gradient gets `least` components and starts at the base. Importance grows with the size of weights: layers with
    large ones win. Keeps `most` numbers a row and a column of each weight until all have been read.
    """

    steps: PositiveInt = 32
    """Optimizer steps whose mean gradients are averaged, each of its batches (`gora_n_steps`)."""
    step_size: PositiveFloat = 0.05
    r""":math:`\eta` (`gora_lr`)."""
    sign: Literal[-1, 1] = -1
    """-1 goes down the loss; 1 is what the released code does, which goes up."""
    importance: Literal["mean", "frobenius", "nuclear", "gradient"] = "mean"
    r"""Of a module: the mean of :math:`|W \odot \bar G|` (the scripts' choice), its Frobenius norm (the parser's
    default) or nuclear norm, or the mean of :math:`|\bar G|`."""
    cost: Literal["sum", "sqrt"] = "sum"
    r"""What a component costs: :math:`m+n` (the scripts), or :math:`\sqrt{m+n}`, as the paper is said to have it (not
    verified)."""
    least: PositiveInt = 4
    """Lowest rank of a module."""
    most: PositiveInt = 32
    """Highest rank of a module."""
    respend: bool = False
    """Whether what the bounds take or give is shared out over the other modules, in proportion to importance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.least <= self.most, self, "least", f"an integer from 1 to most={self.most}")

    def check(self, config: Any) -> None:
        """Refuse a support, of whose part in the budget GoRA says nothing."""
        if config.has_support:
            raise ValueError(
                f"start={self} finds the ranks of low-rank halves that are alone, and density={config.density}, budget="
                f"{config.budget} adds a support. Set density=0, or start=GradientSplit(), which sizes both halves."
            )

    @property
    def statistic(self) -> Statistic:
        """The mean gradient of the steps."""
        return MeanStepGradient(steps=self.steps)

    def summary(self, site: StartSite, state: dict[str, Tensor] | None) -> Projection:
        """The importance, and the product of the gradient with as many rows of A as there may be."""
        A = site.draw_A(self.most)
        if state is None:
            return Projection(0.0, A, A.new_zeros(site.rows, self.most))
        product = state["mean"] @ A.t()
        return Projection(self._importance(site, state["mean"]), A, product)

    def _importance(self, site: StartSite, gradient: Tensor) -> float:
        weighted = gradient if self.importance == "gradient" else gradient.mul_(site.weight())
        if self.importance == "frobenius":
            return float(torch.linalg.matrix_norm(weighted))
        if self.importance == "nuclear":
            return float(torch.linalg.matrix_norm(weighted, ord="nuc"))
        return float(weighted.abs().mean(dtype=torch.float64))

    def decide(self, sites: Mapping[str, StartSite], summaries: Mapping[str, Projection]) -> dict[str, Started]:
        """The ranks, and both factors of each module."""
        ranks = self.ranks(sites, {name: found.importance for name, found in summaries.items()})
        started = {}
        for name, found in summaries.items():
            A, product = found.A[: ranks[name]], found.product[:, : ranks[name]]
            size = self.sign * self.step_size * math.sqrt(sites[name].cols / ranks[name])
            started[name] = Started(A.clone(), size * projected(product, A))
        return started

    def ranks(self, sites: Mapping[str, StartSite], importances: Mapping[str, float]) -> dict[str, int]:
        """Components of each module."""
        costs = {n: math.sqrt(site.sides) if self.cost == "sqrt" else site.sides for n, site in sites.items()}
        budget = sum(sites[name].rank * cost for name, cost in costs.items())
        total = sum(importances.values())

        def parts(factor: float) -> dict[str, int]:
            shares = {name: factor * budget * (importances[name] / total) for name in sites}
            return {name: self._bounded(shares[name], costs[name]) for name in sites}

        if not self.respend:
            return parts(1.0)
        spent = lambda factor: sum(rank * costs[name] for name, rank in parts(factor).items())  # noqa: E731
        low, high = 0.0, 1.0
        while spent(high) < budget and high < 1e12:
            low, high = high, 2 * high
        for _ in range(60):  # the largest factor that the budget pays for: all of a double's digits
            middle = (low + high) / 2
            low, high = (middle, high) if spent(middle) <= budget else (low, middle)
        return parts(low)

    def _bounded(self, share: float, cost: float) -> int:
        return min(max(int(round(share) // cost), self.least), self.most)


def projected(product: Tensor, A: Tensor) -> Tensor:
    r""":math:`B = G A^\top (A A^\top + \epsilon I)^+` `[rows, r]`, by `product` :math:`= G A^\top`, so that
    :math:`B A` is G's projection on the rows of `A` `[r, cols]`; computed in fp64."""
    A64 = A.double()
    gram = A64 @ A64.t()
    gram.diagonal().add_(1e-8)
    return (product.double() @ torch.linalg.pinv(gram, hermitian=True)).to(product.dtype)
