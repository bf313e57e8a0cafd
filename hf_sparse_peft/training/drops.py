"""Who leaves a support at a move: an importance per trained unit, the least important first."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rules.budgets import unit_sums
from .base import AdaptedLayer


def importance(part: AdaptedLayer, sensitivity: Tensor | None) -> Tensor | None:
    r"""`[n]` importance of the trained units by the config's drop rule; None for `none`.

    `magnitude`: :math:`\sum |\delta|` over the entries of a unit. `signed_magnitude`: its place among the units of its
    sign (`place_in_sign`). `sensitivity`: the given scores. `age`: the step at
    which a unit entered, oldest (or youngest) first, and among equals the smallest :math:`\sum |\delta|` first.
    """
    rule = part.config.regrowth
    if rule.drop == "none":
        return None
    if rule.drop == "sensitivity":
        return sensitivity
    magnitude = unit_sums(part.values[: part.units.numel()])[part.trained]
    if rule.drop == "magnitude":
        return magnitude
    if rule.drop == "signed_magnitude":
        values = part.values.detach()[: part.units.numel()][part.trained].float()
        return place_in_sign(values.reshape(values.shape[0], -1).sum(1), magnitude)
    entered = part.layer.sparse_lora_entered[part.adapter][: part.units.numel()][part.trained].double()
    # Places in the order of magnitudes, one for all that are equal; the step counts before them.
    place = torch.unique(magnitude, return_inverse=True)[1].double()
    signed = entered if rule.drop_first == "oldest" else -entered
    return signed + place / max(entered.numel(), 1)


def place_in_sign(sums: Tensor, magnitude: Tensor) -> Tensor:
    r"""`[n]` float64: :math:`(i + \tfrac12) / n_s` for the i-th smallest magnitude of the :math:`n_s` units of the same
    sign (the mean place for equal ones), 0 for units without one, NaN for those that are not finite. The smallest share
    :math:`\zeta` of all is then the smallest positive share :math:`\zeta` and the largest negative share :math:`\zeta`
    (SET; Mocanu et al., 2018)."""
    places = torch.zeros(sums.numel(), dtype=torch.float64, device=sums.device)
    for side in (sums > 0, sums < 0):
        at = side.nonzero().squeeze(1)
        _, where, counts = torch.unique(magnitude[at], return_inverse=True, return_counts=True)
        places[at] = ((counts.cumsum(0) - counts.double() / 2) / max(at.numel(), 1))[where]
    return places.masked_fill_(~torch.isfinite(magnitude), torch.nan)


def can_drop(part: AdaptedLayer, worth: Tensor | None, count: int) -> bool:
    """Whether `worth`, as `importance` gives it, says which `count` of the trained units leave.

    Magnitudes and sensitivities that are all 0 do not, unless all units leave; ages always do. Without a drop rule the
    growth decides.
    """
    if part.config.regrowth.drop == "none":
        return True
    if worth is None or not bool(torch.isfinite(worth).all()):
        return False
    return part.config.regrowth.drop == "age" or count == worth.numel() or bool(worth.any())


@torch.no_grad()
def step_sensitivity(part: AdaptedLayer) -> Tensor | None:
    r"""`[n]` fp32 :math:`\sum |\delta\,\partial L/\partial\delta|` of the trained units at the current step: to first
    order, what the loss changes by when the unit's delta is removed (Molchanov et al., 2017). None without a finite
    gradient. Gradients are averaged over ranks already; a loss scale or clipping changes no rank."""
    gradient = part.values.grad
    if gradient is None:
        return None
    alive = part.units.numel()
    scores = unit_sums(part.values[:alive].float() * gradient[:alive].float())[part.trained]
    return scores if bool(torch.isfinite(scores).all()) else None
