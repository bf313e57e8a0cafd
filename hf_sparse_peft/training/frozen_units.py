"""Units that stopped training and whose learned change lives on: kept bit for bit, and retired within their room."""

from __future__ import annotations

import warnings
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rules.budgets import unit_sums
from ..sparsity import stream_seed, top_units
from .base import AdaptedLayer
from .support_moves import replace_units


class FrozenUnits:
    """Keeps the frozen units of some layers as they are while an optimizer steps on the whole parameter.

    Their gradients are zeroed before clipping sees them, so moments that start at zero stay there, and their values
    are put back after the step, whatever weight decay or momentum did to them.
    """

    def __init__(self) -> None:
        self.parts: list[AdaptedLayer] = []
        self._hooks: list[Any] = []
        self._saved: list[tuple[AdaptedLayer, Tensor, Tensor]] = []
        self._at: dict[AdaptedLayer, tuple[Tensor, int, Tensor]] = {}

    def attach(self, parts: list[AdaptedLayer]) -> None:
        """Watch over those of `parts` that may have frozen units."""
        self.detach()
        _warn_full.cache_clear()  # once a run, not once a process
        self.parts = [part for part in parts if part.adapter in part.layer.sparse_lora_frozen]
        self._hooks = [part.values.register_hook(partial(_zero_frozen, part)) for part in self.parts]

    def detach(self) -> None:
        """Let go; a step that was broken off half-way is undone where units are frozen."""
        self.restore()
        for hook in self._hooks:
            hook.remove()
        self.parts, self._hooks, self._saved, self._at = [], [], [], {}

    @torch.no_grad()
    def save(self) -> None:
        """Remember the frozen values, just before a step."""
        self._saved = []
        for part in self.parts:
            at = self._frozen_at(part)
            if at.numel():
                self._saved.append((part, at, part.values.detach().index_select(0, at)))

    def _frozen_at(self, part: AdaptedLayer) -> Tensor:
        frozen = part.layer.sparse_lora_frozen[part.adapter]
        known = self._at.get(part)
        if known is None or known[0] is not frozen or known[1] != frozen._version:
            # Reading positions waits for a GPU: once a move, not once a step.
            known = self._at[part] = (frozen, frozen._version, frozen.nonzero().squeeze(1))
        return known[2]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back, just after it."""
        for part, at, values in self._saved:
            part.values.index_copy_(0, at, values)
        self._saved = []


def _zero_frozen(part: AdaptedLayer, gradient: Tensor) -> Tensor | None:
    if part.adapter not in part.layer.sparse_lora_frozen:
        return None  # the hook outlived its run
    frozen = part.layer.sparse_lora_frozen[part.adapter].bool()
    return gradient.masked_fill(frozen.view(-1, *[1] * (gradient.dim() - 1)), 0)


class Settled(NamedTuple):
    """What became of a support."""

    entered: int
    """Units that train now and did not before."""
    retired: int
    """Units that keep a learned change without training, after the move."""
    lost: int
    """Units whose learned change was given up for want of room."""


@torch.no_grad()
def settle(part: AdaptedLayer, trained: Tensor, optimizer: Any, seeds: dict[str, Tensor] | None = None) -> Settled:
    """Make `trained` (sorted, as many as now) the units that train; those that leave with a learned change retire.

    Retired units keep their value and lose their optimizer state; one that comes back into training keeps its value
    and starts with zero state. Where the room is too small, those with the smallest sum of |value| give theirs up.
    Without room (`retired_share=0`) whoever leaves gives up its change, as published for SpIEL, SET and RigL.
    """
    before = part.trained_units
    entered = int((~torch.isin(trained, before)).sum())
    if part.adapter not in part.layer.sparse_lora_frozen:
        replace_units(part, trained, optimizer, seeds)
        return Settled(entered, 0, 0)
    living, values = part.units, unit_sums(part.values[: part.units.numel()])
    keeps = ~torch.isin(living, trained) & (values > 0)
    retired, worth = living[keeps], values[keeps]
    room = part.values.shape[0] - trained.numel()
    lost = max(0, retired.numel() - room)
    if lost:
        retired = retired[top_units(worth, room, seed=stream_seed(part.config.seed, "retired", part.name)).long()]
        _warn_full(part.config.regrowth.retired_share)
    support = torch.cat([trained, retired]).sort().values
    changed_side = torch.cat([retired, trained[~torch.isin(trained, before)]])
    replace_units(part, support, optimizer, seeds, restarted=changed_side)
    frozen = part.layer.sparse_lora_frozen[part.adapter].zero_()
    frozen[torch.searchsorted(support, retired)] = 1
    return Settled(entered, retired.numel(), lost)


@cache
def _warn_full(share: float) -> None:
    warnings.warn(
        f"The room for retired units is full (regrowth.retired_share={share}): those with the smallest learned change "
        "lose it from now on, counted as `lost` in MaskRegrowthCallback.replaced. Raise retired_share, or move less.",
        stacklevel=3,
    )
