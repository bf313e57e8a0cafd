"""One unit space over time: when its units entered, what it began with, and how much of the gradient it sees."""

from __future__ import annotations

from typing import Any

import torch

from ..rules import UnitSpace
from ..rules.collectives import all_reduce_mean
from ..rules.gradient_readers import MicroBatchReader

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class SupportTracker:
    """Follows the units of one space through their moves.

    Memory: three times `[k]` integers a layer: the units that training began with, those of the last record, and the
    step at which each living unit entered. They lie on the layer's device, and in checkpoints (`state`).
    """

    def __init__(self, space: UnitSpace, step: int, saved: dict[str, torch.Tensor] | None = None) -> None:
        self.space = space
        self.units = space.alive().clone()
        self._seen = space.version()
        saved = {name: tensor.to(self.units.device) for name, tensor in (saved or {}).items()}
        # A file that was written for another support says nothing about this one.
        known = _is_state(saved) and saved["entered"].shape == self.units.shape
        self.initial = saved["initial"] if known else self.units.clone()
        self.recorded = saved["recorded"] if known else self.units.clone()
        self.entered = saved["entered"] if known else torch.full_like(self.units, step, dtype=torch.int32)

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run must find again."""
        return {"initial": self.initial, "recorded": self.recorded, "entered": self.entered}

    def follow(self, step: int) -> None:
        """Notice a move that happened after update `step`."""
        version = self.space.version()
        if version is not None and version == self._seen:
            return
        self._seen, units = version, self.space.alive().clone()
        entered = torch.full_like(units, step, dtype=torch.int32)
        if self.units.numel() and units.numel():
            place = torch.searchsorted(self.units, units).clamp_max(self.units.numel() - 1)
            kept = self.units[place] == units
            entered[kept] = self.entered[place[kept]]
        self.units, self.entered = units, entered

    def counts(self) -> dict[str, int]:
        """Living units, those of them that the last record did not have, and those that training began with."""
        fresh = int((~torch.isin(self.units, self.recorded)).sum())
        return {"alive": self.units.numel(), "fresh": fresh, "initial": int(torch.isin(self.units, self.initial).sum())}

    def ages(self, step: int, optimizer: Any) -> tuple[str, torch.Tensor]:
        """Where ages come from, and the age of each living unit in updates.

        `"optimizer"`: an optimizer with per-unit steps (`AgedAdamW`) knows them, SpIEL's seeded ages included.
        `"moves"`: updates since the unit last entered.
        """
        state = getattr(optimizer, "optimizer", optimizer)
        values = next((parameter for parameter, axis in self.space.parameter_axes() if axis == 0), None)
        steps = getattr(state, "state", {}).get(values, {}).get("step")
        if isinstance(steps, torch.Tensor) and steps.dim() and steps.shape[0] == values.shape[0]:
            return "optimizer", steps.reshape(steps.shape[0], -1)[: self.units.numel(), 0]
        return "moves", step - self.entered

    def mark_recorded(self) -> None:
        """Churn counts from here."""
        self.recorded = self.units


def _is_state(saved: dict[str, torch.Tensor]) -> bool:
    return all(
        name in saved and saved[name].dim() == 1 and saved[name].dtype in (torch.int32, torch.int64)
        for name in ("initial", "recorded", "entered")
    )


def quantiles(values: torch.Tensor) -> list[float]:
    """Least, quartiles and largest, each one of `values` (the lower neighbour: `torch.quantile` stops at 2^24)."""
    if not values.numel():
        return []
    ordered = values.sort().values
    return [float(ordered[int(q * (ordered.numel() - 1))]) for q in QUANTILES]


class GradientShare(MicroBatchReader):
    r"""Fraction of a layer's gradient that its living units see: :math:`\|G_S\|_F^2 / \|G\|_F^2`.

    `G` is the dense gradient `[out, in]` of one micro-batch, which lives inside this layer's backward pass only; with
    several micro-batches or ranks both squares are summed over them (no sum of gradients is kept).

    Args:
        spaces: spaces of one layer whose units are parts of the weight.
    """

    def __init__(self, spaces: list[UnitSpace]) -> None:
        super().__init__()
        self.spaces, self.layer = spaces, spaces[0].layer
        self._squares = torch.zeros(1 + len(spaces))

    def take_whole(self, dense: torch.Tensor) -> None:
        """Add the squares of one micro-batch."""
        seen = [dense, *(space.gather(dense) for space in self.spaces)]
        squares = [torch.linalg.vector_norm(part, dtype=torch.float32).square() for part in seen]
        self._squares = self._squares.to(dense.device) + torch.stack(squares)

    def squares(self) -> list[float]:
        """The dense square and each space's, averaged over ranks. Every rank must ask."""
        return all_reduce_mean(self._squares.to(self.layer.get_base_layer_device())).tolist()
