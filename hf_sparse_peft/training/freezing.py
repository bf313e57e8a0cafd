"""SaRA's adjustment: entries that grew past a threshold freeze, once."""

from __future__ import annotations

import warnings

import torch

from ..optim import restart_optimizer_state
from ..rules.no_effect import report_idle
from ..tuners.sparse_lora import SparseLoraConfig
from .base import AdaptedLayer, ScheduleCallback
from .frozen_units import FrozenUnits
from .penalties import support_weights
from .support_moves import leave_update_out, refuse_unskippable


class ThresholdFreezingCallback(ScheduleCallback):
    r"""Freezes entries that grew past the threshold, for adapters that set `freezing` (SaRA; Hu et al., 2025).

    At step `round(freezing.at * T)` the support `M0` splits: entries with :math:`|w + \delta| < \tau` go on training
    with fresh optimizer state (`M1`), the others keep their value from then on. `w` is the base weight, dequantised
    where it is 4-bit. Weight decay pulls deltas to 0, that is, weights to their pretrained values; the official code,
    which trains the weights themselves, pulls these to 0.
    """

    option = "freezing"

    def __init__(self) -> None:
        super().__init__()
        self.guard = FrozenUnits()
        self.frozen: list[dict[str, int]] = []
        """One record an adjustment: step, entries frozen, entries that go on."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Find the layers and check the step of the adjustment."""
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer, **kwargs)
        self.guard.attach(self.parts)
        for config in self.configs():
            if config.freezing.skip_step:
                refuse_unskippable(args, "freezing", self.parts_of(config), optimizer)

    def check_length(self, config: SparseLoraConfig) -> None:
        """There must be steps before and after the adjustment."""
        update = self._update_of(config)
        if not 1 < update < self.total_steps:
            raise ValueError(
                f"freezing.at={config.freezing.at} of a run of {self.total_steps} steps is step {update}, which leaves "
                "none before or after it. Train longer, or set freezing=None."
            )

    def check_effect(self, config: SparseLoraConfig) -> None:
        """Name the layers that would freeze whole whatever training does."""
        parts = [part for part in self.parts_of(config) if part.units.numel()]
        whole = [part for part in parts if _is_past_already(part)]
        report_idle(
            [part.name for part in whole],
            len(parts),
            f"freezing.threshold={config.freezing.threshold} is not above any weight of the support, so that at step "
            f"{self._update_of(config)} every entry freezes",
            "Raise threshold, set criterion='smallest_magnitude', or set freezing=None.",
        )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Keep frozen values aside, and leave out the update that an adjustment replaces."""
        due = [part for part in self.parts if self._update_of(part.config) == state.global_step + 1]
        leave_update_out([part for part in due if part.config.freezing.skip_step])
        self.guard.save()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Put frozen values back."""
        self.guard.restore()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Freeze what grew past the threshold, at rest or not: values at rest are those it will wake up with."""
        due = [part for part in self.parts if self._update_of(part.config) == state.global_step]
        if not due:
            return
        frozen = sum(freeze_past_threshold(part) for part in due)
        alive = sum(part.trained_units.numel() for part in due)
        for part in due:
            restart_optimizer_state(optimizer, part.values)
        self.frozen.append({"step": state.global_step, "frozen": frozen, "alive": alive})
        if not frozen:
            warnings.warn(
                f"freezing: no entry had grown past its threshold at step {state.global_step}; all go on training, "
                "with fresh optimizer state. Lower freezing.threshold, or set freezing=None.",
                stacklevel=2,
            )
        if not alive:
            warnings.warn(
                "Every entry of the support grew past its threshold: nothing of it trains from here on. Raise "
                "freezing.threshold or lower the learning rate.",
                stacklevel=2,
            )

    def release(self) -> None:
        """Let go of the frozen values."""
        self.guard.detach()

    def _update_of(self, config: SparseLoraConfig) -> int:
        return round(config.freezing.at * self.total_steps)


def _is_past_already(part: AdaptedLayer) -> bool:
    base, values = support_weights(part)
    threshold = part.config.freezing.threshold
    if threshold is None:  # each matrix's own, from which no entry starts further out
        return False
    return bool(((base + values).abs() >= threshold).all())


def smallest_beside_zero(weight: torch.Tensor) -> float:
    """The smallest |w| > 0; infinity where there is none."""
    rows = (part.abs().float() for part in weight.split(256))
    return min(float(torch.where(part > 0, part, torch.inf).min()) for part in rows)


@torch.no_grad()
def freeze_past_threshold(part: AdaptedLayer) -> int:
    """Mark the trained entries of one layer with |w + delta| at the threshold or above; returns how many."""
    base, values = support_weights(part)
    threshold = part.config.freezing.threshold
    largest = base.abs().max()
    if threshold is None and largest == 0:
        # 9 % of an NF4 weight are exactly 0: a support of some of them would freeze whole at its first movement.
        threshold = smallest_beside_zero(part.layer.dense_base_weight())
    past = (base + values).abs() >= threshold if threshold is not None else (base + values).abs() > largest
    past &= part.trained
    part.layer.sparse_lora_frozen[part.adapter][: past.numel()][past] = 1
    return int(past.sum())
