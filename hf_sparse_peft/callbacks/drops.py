"""Who leaves a support at a move: an importance per trained unit, the least important first."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import AdaptedLayer, unit_sums


def importance(part: AdaptedLayer, sensitivity: Tensor | None) -> Tensor | None:
    r"""`[n]` importance of the trained units by the config's drop rule; None for `none`.

    `magnitude`: :math:`\sum |\delta|` over the entries of a unit. `sensitivity`: the given scores. `age`: the step at
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
    entered = part.layer.sparse_lora_entered[part.adapter][: part.units.numel()][part.trained].double()
    place = torch.empty_like(entered)
    place[magnitude.argsort(stable=True)] = torch.arange(entered.numel(), device=place.device, dtype=place.dtype)
    signed = entered if rule.drop_first == "oldest" else -entered
    return signed + place / max(entered.numel(), 1)


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
