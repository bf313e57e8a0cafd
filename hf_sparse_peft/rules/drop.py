"""Who leaves a support at a move: an importance of every trained unit, the least important first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..utils.parts import Part, register_part
from ..utils.tensors import TensorSpec, whole
from .space import UnitSpace, unit_sums


@dataclass(frozen=True)
class Drop(Part):
    """Base of the drop criteria of `Regrow`: which units leave. A subclass is a registered frozen dataclass."""

    part_kind: ClassVar[str] = "drop"
    takes_shards: ClassVar[bool] = False
    """As `Rule.takes_shards`."""

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """Tensors (role "rule") to keep for one space, as `Rule.state`."""
        return []

    def measure(self, space: UnitSpace) -> Tensor | None:
        """What must be read at the step of a move, before its update, while gradients are there."""
        return None

    def importance(self, space: UnitSpace, measured: Tensor | None) -> Tensor | None:
        """`[n]` importance of the trained units, in the order of `space.trained_units()`: the smallest leave. None
        where nothing is known of it, and no unit moves."""
        raise NotImplementedError

    def can_rank(self, importance: Tensor | None, count: int) -> bool:
        """Whether `importance` says which `count` units leave: finite, and not all 0 unless all units leave."""
        if importance is None or not bool(torch.isfinite(importance).all()):
            return False
        return count == importance.numel() or bool(importance.any())

    def moved(self, space: UnitSpace, before: Tensor, update: int) -> None:
        """Called after a move at step `update`; `before` are the units that were trained until then."""


@register_part("magnitude")
@dataclass(frozen=True)
class Magnitude(Drop):
    r"""The smallest :math:`\sum|\delta|` over the entries of a unit leave."""

    takes_shards: ClassVar[bool] = True

    def importance(self, space: UnitSpace, measured: Tensor | None) -> Tensor | None:
        """`[n]` fp32 sums."""
        return unit_sums(space.living_values())[space.trained()]


@register_part("signed_magnitude")
@dataclass(frozen=True)
class SignedMagnitude(Drop):
    """The same fraction of the positive units and of the negative ones leaves, those closest to 0; units that are still
    0 leave first (SET; Mocanu et al., 2018)."""

    takes_shards: ClassVar[bool] = True

    def importance(self, space: UnitSpace, measured: Tensor | None) -> Tensor | None:
        """`[n]` float64 places (`place_in_sign`)."""
        values, trained = space.living_values(), space.trained()
        sums = values[trained].float().reshape(int(trained.sum()), -1).sum(1)
        return place_in_sign(sums, unit_sums(values)[trained])


@register_part("sensitivity")
@dataclass(frozen=True)
class Sensitivity(Drop):
    r"""The smallest :math:`\sum|\delta\,\partial L/\partial\delta|` at the move's own step leave: to first order, what
    the loss changes by when the unit's delta is removed (Molchanov et al., 2017)."""

    takes_shards: ClassVar[bool] = True

    @torch.no_grad()
    def measure(self, space: UnitSpace) -> Tensor | None:
        """`[n]` fp32 scores of the trained units; None without a finite gradient. Gradients are averaged over ranks
        already; a loss scale or clipping changes no rank."""
        if space.values.grad is None:
            return None
        gradient = whole(space.values.grad)[: space.count]
        scores = unit_sums(space.living_values().float() * gradient.float())[space.trained()]
        return scores if bool(torch.isfinite(scores).all()) else None

    def importance(self, space: UnitSpace, measured: Tensor | None) -> Tensor | None:
        """What was measured."""
        return measured


@register_part("age")
@dataclass(frozen=True)
class Age(Drop):
    r"""The units that have been in the support longest leave, or shortest; among equals the smallest
    :math:`\sum|\delta|`."""

    takes_shards: ClassVar[bool] = True

    first: Literal["oldest", "youngest"] = "oldest"
    """Which end of the ages leaves first."""

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """`entered`, the step after which a unit entered."""
        return [TensorSpec("entered", (space.capacity,), torch.int32, role="rule", space=space.kind)]

    def importance(self, space: UnitSpace, measured: Tensor | None) -> Tensor | None:
        """`[n]` float64: the step of entry (negated for `youngest`), and below it the place by magnitude."""
        trained = space.trained()
        entered = space.state()["entered"][: space.count][trained].double()
        # Places in the order of magnitudes, one for all that are equal; the step counts before them.
        place = torch.unique(unit_sums(space.living_values())[trained], return_inverse=True)[1].double()
        return (entered if self.first == "oldest" else -entered) + place / max(entered.numel(), 1)

    def can_rank(self, importance: Tensor | None, count: int) -> bool:
        """Ages always do, where values are finite."""
        return importance is not None and bool(torch.isfinite(importance).all())

    def moved(self, space: UnitSpace, before: Tensor, update: int) -> None:
        """Note who entered."""
        fresh = torch.isin(space.alive(), before, invert=True)
        space.state()["entered"][: fresh.numel()][fresh] = update


def place_in_sign(sums: Tensor, magnitude: Tensor) -> Tensor:
    r"""`[n]` float64: :math:`(i + \tfrac12) / n_s` for the i-th smallest magnitude of the :math:`n_s` units of the same
    sign (the mean place for equal ones), 0 for units without one, NaN for those that are not finite. The smallest
    fraction :math:`\zeta` of all is then the smallest positive fraction :math:`\zeta` and the largest negative one.
    """
    places = torch.zeros(sums.numel(), dtype=torch.float64, device=sums.device)
    for side in (sums > 0, sums < 0):
        at = side.nonzero().squeeze(1)
        _, where, counts = torch.unique(magnitude[at], return_inverse=True, return_counts=True)
        places[at] = ((counts.cumsum(0) - counts.double() / 2) / max(at.numel(), 1))[where]
    return places.masked_fill_(~torch.isfinite(magnitude), torch.nan)
