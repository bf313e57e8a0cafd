"""`GradientSplit`: one budget of numbers for the best sparse + low-rank fit of all gradients together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...sparsity import Budget, MeanStepGradient, Random, Statistic, UnitGrid, chunks_of
from ...sparsity.decomposition import low_rank_beside_entries, truncated_svd
from ...sparsity.ranking import GlobalRanking
from ...utils.option_types import NonNegativeFloat, PositiveFraction, PositiveInt
from ...utils.parts import register_part
from .starts import Start, Started, StartSite

_CHUNK = 1 << 20
_LOWEST, _HIGHEST, _PER_OCTAVE = -300, 260, 8
"""Prices of a number are powers of two, so many an octave, over all squares of fp32."""


class Fit(NamedTuple):
    """The low-rank part of one rank, and what is left of the gradient beside it."""

    B: Tensor
    A: Tensor
    entries: Tensor
    """`[prices]` int64: entries whose squared residual is above each price."""
    objective: Tensor
    r"""`[prices]` fp64: :math:`\sum \min(R^2, \lambda) + \lambda\,r(m+n)`."""


class Fits(NamedTuple):
    """What is kept of a module until all have been read."""

    gradient: Tensor
    """fp32 `[rows, cols]` on the CPU."""
    by_rank: list[Fit]


@register_part("gradient_split")
@dataclass(frozen=True)
class GradientSplit(Start):
    r"""Ranks of the low-rank halves and entries of the supports in one budget of trained numbers over the whole model,
    so that :math:`\sum_l \|M_l - L_l - S_l\|_F^2` is small for the mean gradients :math:`M_l`: a component of an
    `[m, n]` weight costs :math:`m+n` numbers, an entry 1.

    For ranks up to `most` (all up to 4, then 6, 8, 12, 16, ...) :math:`L_l` is fitted beside as many entries as the
    module's own share of the budget leaves: largest entries first, then an SVD of the rest, in turns
    (`sparsity.decomposition.low_rank_beside_entries`). All modules have one price of a number, the lowest that the
    budget pays for: each takes the rank, and the entries of the residual, that are worth most at that price. What the
    last step of the price (an eighth of an octave) leaves goes to the largest residuals. A module may get no component,
    no entry, or neither. A starts at the right singular vectors of :math:`M_l - S_l`; the update at
    :math:`-c\,(L_l + S_l)`, with the default c = 0 at the base.

    This is a reading of RA-SpaRC (OpenReview WgyDYMUfSK), of which the abstract alone was read: that it is an
    initialisation in one budget, which balances the sparse and the low-rank part by itself. What it compresses, its
    scale and its constants are not known; those here are this project's.

    Keeps the fp32 gradients of all adapted weights in the CPU's memory until all have been read, and takes a few
    truncated SVDs of each for every rank that is tried.
    """

    fraction: PositiveFraction = 1.0
    """Of the numbers that the config's ranks and density (or budget) stand for."""
    steps: PositiveInt = 8
    """Optimizer steps whose mean gradients are averaged."""
    most: PositiveInt = 32
    """Highest rank of a module."""
    step_size: NonNegativeFloat = 0.0
    """c; above 0 the model starts moved, down the loss."""

    def check(self, config: Any) -> None:
        """Refuse a config without a support, or one that chooses or sizes it otherwise."""
        if not (config.has_support or config.sizes):
            raise ValueError(
                f"start={self} splits a budget over both halves, and density={config.density} leaves the sparse one "
                "out. Set density > 0, or start=GradientProjection()."
            )
        budget = config.budget if isinstance(config.budget, Budget) else None
        refused = {
            "criterion": not isinstance(config.criterion, Random),
            "pattern": config.pattern is not None,
            "granularity": config.granularity != "entry",
            "granularity_pattern": bool(config.granularity_pattern),
            "support_init": config.support_init != "zeros",
            "scale_support": config.scale_support is True,
            "budget": budget is not None and (budget.ranks_units or type(budget).ranks is not Budget.ranks),
        }
        for name in (name for name, is_set in refused.items() if is_set):
            raise ValueError(
                f"start={self} chooses single entries of all weights by their gradients, and {name}="
                f"{getattr(config, name)} would choose, cut, size or scale them otherwise. Leave {name} at its default."
            )

    @property
    def statistic(self) -> Statistic:
        """The mean gradient of the steps."""
        return MeanStepGradient(steps=self.steps)

    def summary(self, site: StartSite, state: dict[str, Tensor] | None) -> Fits:
        """The gradient, and its low-rank part for every rank that is tried."""
        if state is None:
            nothing = torch.zeros(site.rows, site.cols, device=site.device)
            return Fits(nothing.cpu(), [_fit(nothing, nothing[:, :0], nothing[:0])])
        gradient, share = state["mean"], int(self.fraction * (site.rank * site.sides + site.units))
        ranks = _ladder(min(self.most, site.rows, site.cols))
        own, fits = truncated_svd(gradient, ranks[-1]), []
        for rank in ranks:
            entries = min(max(share - rank * site.sides, 0), gradient.numel())
            fits.append(_fit(gradient, *low_rank_beside_entries(gradient, rank, entries, own)))
        return Fits(gradient.cpu(), fits)

    def decide(self, sites: Mapping[str, StartSite], summaries: Mapping[str, Fits]) -> dict[str, Started]:
        """The factors, the entries and their values."""
        numbers = round(self.fraction * sum(site.rank * site.sides + site.units for site in sites.values()))
        fits = _within(numbers, {name: found.by_rank for name, found in summaries.items()})
        entries = numbers - sum(len(fit.A) * sites[name].sides for name, fit in fits.items())
        gradients = {name: found.gradient for name, found in summaries.items()}
        units = _largest_residuals(entries, sites, gradients, fits) if entries else {}
        return {name: self._started(site, fits[name], gradients[name], units.get(name)) for name, site in sites.items()}

    def _started(self, site: StartSite, fit: Fit, gradient: Tensor, units: Tensor | None) -> Started:
        A, B = fit.A.clone(), -self.step_size * fit.B
        if units is None or not units.numel():
            return Started(A, B)
        rows, cols = units.long() // site.cols, units.long() % site.cols
        own = gradient[rows.to(gradient.device), cols.to(gradient.device)].to(site.device)
        residual = own - (fit.B[rows] * fit.A.t()[cols]).sum(1)
        return Started(A, B, units, -self.step_size * residual)


def _ladder(most: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, ... up to `most`, which is one of them."""
    found, step = list(range(min(most, 4) + 1)), 2
    while found[-1] < most:
        for _ in range(2):
            found.append(found[-1] + step)
        step *= 2
    return [rank for rank in found if rank < most] + [most]


def _fit(gradient: Tensor, B: Tensor, A: Tensor) -> Fit:
    """How many entries are above each price, and what the objective is then, by one pass over the residual."""
    squares = (gradient - B @ A).double().square_().flatten()
    size = (_HIGHEST - _LOWEST) * _PER_OCTAVE
    prices = _prices(size)
    # The lowest price that a square is not above; 0 is above none.
    at = ((squares.log2() - _LOWEST) * _PER_OCTAVE).ceil_().clamp_(0, size).long()
    counts = torch.bincount(at, minlength=size + 1)
    sums = torch.bincount(at, weights=squares, minlength=size + 1)
    above = counts.flip(0).cumsum(0).flip(0)[1:].cpu()
    objective = sums.cumsum(0)[:-1].cpu() + prices * (above + A.shape[0] * sum(gradient.shape))
    return Fit(B, A, above, objective)


def _prices(size: int) -> Tensor:
    """Ascending."""
    return 2.0 ** (_LOWEST + torch.arange(size, dtype=torch.float64) / _PER_OCTAVE)


def _within(numbers: int, fits: Mapping[str, list[Fit]]) -> dict[str, Fit]:
    """The fits that are best at the lowest price at which all of them together take at most `numbers`."""
    best, taken = {}, 0
    for name, by_rank in fits.items():
        best[name] = torch.stack([fit.objective for fit in by_rank]).argmin(0)
        costs = torch.stack([fit.entries + len(fit.A) * (fit.B.shape[0] + fit.A.shape[1]) for fit in by_rank])
        taken = taken + costs.gather(0, best[name][None])[0]
    price = int((taken <= numbers).nonzero()[0])
    return {name: by_rank[int(best[name][price])] for name, by_rank in fits.items()}


def _largest_residuals(
    count: int, sites: Mapping[str, StartSite], gradients: Mapping[str, Tensor], fits: Mapping[str, Fit]
) -> dict[str, Tensor]:
    """The `count` entries of all weights with the largest :math:`|M - L|`, sorted, by module."""
    ranking = GlobalRanking(count, next(iter(sites.values())).seed, least=0)
    for name, site in sites.items():
        B, A, gradient = fits[name].B, fits[name].A, gradients[name]

        def sizes(begin: int, end: int, B=B, A=A, gradient=gradient, device=site.device) -> Tensor:
            return (gradient[begin:end].to(device) - B[begin:end] @ A).abs_()

        ranking.add({name: chunks_of(sizes, UnitGrid(site.rows, site.cols), _CHUNK)})
    return ranking.units()
