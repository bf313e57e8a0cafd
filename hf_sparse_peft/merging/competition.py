"""Parameter competition balancing: entries compete within an adapter and between adapters (PCB-Merging)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sparsity.selection import Source, score_at
from ..utils.option_types import Decay, PositiveFraction
from ..utils.parts import register_part
from .consensus import Agreement, Consensus
from .deltas import Deltas, Scan


@dataclass(frozen=True)
class _Limits:
    """Of each adapter, over the whole model."""

    low: list[float]
    """Smallest clamped magnitude."""
    high: list[float]
    """Largest clamped magnitude."""
    threshold: list[float] | None = None
    """Scores up to it are 0."""
    best: list[float] | None = None
    """The largest score."""


@register_part("competition")
@dataclass(frozen=True)
class Competition(Consensus):
    r"""Shares are scores of a competition of entries (PCB-Merging; Du et al., 2024): with magnitudes clamped to the
    quantiles `clamp` and 1 - `clamp` of each adapter, :math:`a_t`, and :math:`\hat a_t` these scaled to [0, 1],

    .. math::
        \beta_t = \exp(n\,\hat a_t^2)\,\tanh\big(\tau_t \textstyle\sum_s \tau_s\big), \qquad
        S_t = \mathrm{minmax}\big(\max(\beta_t, q_t)\big)

    with :math:`q_t` the quantile of :math:`\beta_t` that leaves the fraction `ratio`; values that go in are
    :math:`\mathrm{sign}(\tau_t)\,a_t`. Quantiles and extremes are those of the union of supports over the whole model,
    where a missing entry has score 0 and always share 0. They are found exactly by passes over the model.

    Where all magnitudes or all scores of an adapter are equal, its entries have equal shares.
    """

    ratio: PositiveFraction = 0.1
    """Fraction of entries that score (the authors' function: 0.1; their example 0.05)."""
    clamp: Decay = 1e-4
    """Tail that is cut on each side (their vision script: 0.01)."""
    between: Literal["raw", "normalised"] = "raw"
    r"""What meets the sum: values as they are, or :math:`\mathrm{sign}(\tau_s)\,\hat a_s`, with which the largest task
    does not lead (the authors' vision script)."""

    def prepare(self, scan: Scan, weights: Sequence[float]) -> _Limits:
        """Quantiles of magnitudes, then of scores; about ten passes."""
        count, low, high = sum(deltas.values.shape[1] for deltas in scan), [], []
        if not count:
            return _Limits([0.0] * scan.adapters, [0.0] * scan.adapters, [0.0] * scan.adapters, [0.0] * scan.adapters)
        ends = (int(count * self.clamp), max(int(count * (1 - self.clamp) - 1), 0))
        for adapter in range(scan.adapters):
            sources = _sources(scan, lambda deltas, adapter=adapter: deltas.values[adapter].abs())
            low.append(score_at(sources, count - ends[0]))
            high.append(score_at(sources, count - ends[1]))
        limits, threshold, best = _Limits(low, high), [], []
        at = min(int(count * (1 - self.ratio)), count - 1)
        for adapter in range(scan.adapters):
            sources = _sources(scan, lambda deltas, adapter=adapter: self._scores(deltas, limits)[adapter])
            threshold.append(score_at(sources, count - at))
            best.append(score_at(sources, 1))
        return _Limits(low, high, threshold, best)

    def __call__(self, deltas: Deltas, weights: Tensor, plan: _Limits) -> Agreement:
        """Clamped values, and scores as shares."""
        scores = self._scores(deltas, plan)
        shares = torch.zeros_like(scores)
        for adapter, (least, best) in enumerate(zip(plan.threshold, plan.best, strict=True)):
            scaled = (scores[adapter] - least) / (best - least) if best > least else torch.ones_like(scores[adapter])
            shares[adapter] = scaled.clamp_min(0)
        return Agreement(deltas.values.sign() * self._clamped(deltas, plan)[0], shares * deltas.held)

    def _clamped(self, deltas: Deltas, limits: _Limits) -> tuple[Tensor, Tensor]:
        """Magnitudes, and the same scaled to [0, 1]."""
        low, high = (deltas.values.new_tensor(one)[:, None] for one in (limits.low, limits.high))
        size = deltas.values.abs().maximum(low).minimum(high)
        span = high - low
        return size, torch.where(span > 0, (size - low) / torch.where(span > 0, span, 1.0), 0.0)

    def _scores(self, deltas: Deltas, limits: _Limits) -> Tensor:
        scaled = self._clamped(deltas, limits)[1]
        met = deltas.values if self.between == "raw" else deltas.values.sign() * scaled
        within = (len(deltas.values) * scaled.square()).exp()
        return within * (deltas.values * met.sum(0)).tanh()


def _sources(scan: Scan, scores: Callable[[Deltas], Tensor]) -> list[Source]:
    return [Source(name, lambda name=name: iter((scores(scan.layer(name)),))) for name in scan.names]
