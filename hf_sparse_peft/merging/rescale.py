"""What the values that were kept are multiplied by, to make up for those that were dropped."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..utils.option_types import PositiveFraction, Range
from ..utils.parts import Part, register_part, require
from .deltas import Deltas
from .sparsify import Kept


@dataclass(frozen=True)
class Rescale(Part):
    """Base of the rescalings; `__call__` gives the updates after it, what was dropped no longer held."""

    part_kind: ClassVar[str] = "rescale"
    needs_draw: ClassVar[bool] = False
    """Whether it goes by the probability of staying, which only a random `Sparsify` has."""

    def __call__(self, deltas: Deltas, kept: Kept) -> Deltas:
        """Rescale one weight's updates."""
        values = deltas.values.masked_fill(~kept.mask, 0) * self.factor(deltas, kept)
        return replace(deltas, values=values, held=kept.mask)

    def factor(self, deltas: Deltas, kept: Kept) -> Tensor | float:
        """What kept values are multiplied by, broadcast over `[n, u]`."""
        raise NotImplementedError


@register_part("unscaled")
@dataclass(frozen=True)
class Unscaled(Rescale):
    """As they are."""

    def factor(self, deltas: Deltas, kept: Kept) -> float:
        """1."""
        return 1.0


@register_part("by_probability")
@dataclass(frozen=True)
class ByProbability(Rescale):
    r""":math:`\tau' = m\,\tau / k`, k the probability with which the entry was to stay, so that the mean over draws is
    :math:`\tau` (DARE; Yu et al., 2024, with k = 1 - p; DELLA with a k for each entry)."""

    needs_draw: ClassVar[bool] = True

    def factor(self, deltas: Deltas, kept: Kept) -> Tensor:
        """1 / k."""
        return 1 / kept.probability


@register_part("by_q")
@dataclass(frozen=True)
class ByQ(Rescale):
    r""":math:`\tau' = m\,\tau / q`, q above the probability of staying (DAREx-q; Deng et al., 2025): `find_q` looks for
    it by a measure, `analytic_q` by inputs of a layer."""

    q: PositiveFraction = 1.0
    """q of all weights."""
    layers: dict[str, PositiveFraction] = field(default_factory=dict)
    """q of single modules, by name; others have `q`."""

    def factor(self, deltas: Deltas, kept: Kept) -> float:
        """1 / q."""
        return 1 / self.layers.get(deltas.name, self.q)


@register_part("by_norm")
@dataclass(frozen=True)
class ByNorm(Rescale):
    """Each adapter's update of a weight gets the L1 norm back that it had, by one factor: what mergekit does for
    `dare_*` and `della*`. It is not unbiased for any single entry."""

    def factor(self, deltas: Deltas, kept: Kept) -> Tensor:
        """The ratio of the norms, `[n, 1]`; 1 where nothing is left."""
        size = deltas.values.abs()
        before, after = size.sum(1, keepdim=True), size.masked_fill(~kept.mask, 0).sum(1, keepdim=True)
        return torch.where(after > 0, before / after, 1.0)


@register_part("dare_k")
@dataclass(frozen=True)
class DareK(Rescale):
    r"""Entries that were dropped keep a share k, others make up for the rest, :math:`\tau' = k (1-m) \tau +
    \frac{1-kp}{1-p} m \tau` with p the probability of being dropped (DARE-k of the unified view of delta editing; Tang
    et al., 2024). k = 0 is DARE, k = 1 the identity; the mean over draws is :math:`\tau` for any k."""

    k: Annotated[float, Range(most=1)] = 0.5
    """Share of a dropped entry that stays; may be negative (the authors: -1 to 0.8)."""

    needs_draw: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(abs(self.k) <= 10, self, "k", "a number in [-10, 1]")

    def __call__(self, deltas: Deltas, kept: Kept) -> Deltas:
        """All entries stay held."""
        dropped = 1 - kept.probability
        factor = torch.where(kept.mask, (1 - self.k * dropped) / kept.probability, self.k)
        return replace(deltas, values=deltas.values * factor)
