"""`Freeze`: entries that grew past a threshold stop training, once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..optim import restart_optimizer_state
from ..utils.option_types import PositiveFloat, Range
from ..utils.parts import register_part
from ..utils.tensors import TensorSpec
from .frozen import frozen_state, hold_frozen
from .no_effect import report_idle
from .rule import Rule, check_entries
from .run import Run, leave_update_out, refuse_unskippable
from .space import UnitSpace


@register_part("freeze")
@dataclass(frozen=True)
class Freeze(Rule):
    r"""Entries whose weight has grown past the threshold stop training, once (SaRA's progressive adjustment; Hu et al.,
    2025).

    At step `round(at * T)` an entry with :math:`|w + \delta| \geq \tau` is frozen: it keeps what it learned and goes on
    adding to the weight. The others go on with fresh optimizer state. `w` is the base weight, dequantised where it is
    4-bit. Weight decay pulls deltas to 0, that is, weights to their pretrained values; the official code, which trains
    the weights themselves, pulls these to 0.
    """

    at: Annotated[float, Range(above=0, below=1)] = 0.5
    """When, as a fraction of the run (SaRA: 2500 steps, about half of it)."""
    threshold: PositiveFloat | None = None
    r""":math:`\tau`; None: each matrix's own, the largest :math:`|w|` that its support began with, so that an entry
    freezes once it is larger than any that was chosen; where that is 0, as on a 4-bit base with more zeros than the
    support has entries, the smallest :math:`|w| > 0` of the matrix."""
    in_place_of_update: bool = True
    """Whether the adjustment takes the place of its step's update, as published."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support"})
    writes: ClassVar[frozenset[str]] = frozenset({"trains"})
    needs: ClassVar[frozenset[str]] = frozenset({"fixed_units", "entries"})

    @property
    def freezes_units(self) -> bool:
        """That is what it does."""
        return True

    def check(self, config: Any) -> None:
        """Refuse an adapter without a support, or of other units than entries."""
        check_entries("Freeze", config)

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """The mark of frozen entries."""
        return [frozen_state(space)]

    def step_of(self, total_steps: int) -> int:
        """The step after which entries freeze."""
        return round(self.at * total_steps)

    # In training

    def begin(self, run: Run) -> None:
        """There must be steps before and after."""
        step = self.step_of(run.total_steps)
        if not 1 < step < run.total_steps:
            raise ValueError(
                f"Freeze.at={self.at} of a run of {run.total_steps} steps is step {step}, which leaves none before or "
                "after it. Train longer, or leave the rule out."
            )
        if not run.resumed:
            self._check_effect(run)
        if self.in_place_of_update:
            refuse_unskippable(run, "Freeze.in_place_of_update")
        hold_frozen(run)

    def _check_effect(self, run: Run) -> None:
        """Name the layers that would freeze whole whatever training does."""
        if self.threshold is None:  # each matrix's own, from which no entry starts further out
            return
        spaces = [space for space in run.spaces(training=False) if space.count]
        whole = [space for space in spaces if bool((_weights(space)[1].abs() >= self.threshold).all())]
        report_idle(
            [space.name for space in whole],
            len(spaces),
            f"Freeze.threshold={self.threshold} is not above any weight of the support, so that at step "
            f"{self.step_of(run.total_steps)} every entry freezes",
            "Raise threshold, set criterion='smallest_magnitude', or leave the rule out.",
        )

    def gradients(self, run: Run) -> None:
        """Leave out the update that the adjustment replaces."""
        if self.in_place_of_update and run.step + 1 == self.step_of(run.total_steps):
            leave_update_out(run.spaces(training=False))

    def after_step(self, run: Run) -> None:
        """Freeze what grew past the threshold, held still or not: those values are the ones that will train again."""
        if run.step != self.step_of(run.total_steps):
            return
        spaces = run.spaces(training=False)
        frozen = sum(freeze_past_threshold(space, self.threshold) for space in spaces)
        alive = sum(space.trained_units().numel() for space in spaces)
        for space in spaces:
            restart_optimizer_state(run.optimizer, space.values)
        run.record(frozen=frozen, alive=alive)
        if not frozen:
            warnings.warn(
                f"Freeze: no entry had grown past its threshold at step {run.step}; all go on training, with fresh "
                "optimizer state. Lower threshold, or leave the rule out.",
                stacklevel=2,
            )
        if not alive:
            warnings.warn(
                "Freeze: every entry of the support grew past its threshold: nothing of it trains from here on. Raise "
                "threshold or lower the learning rate.",
                stacklevel=2,
            )


@torch.no_grad()
def freeze_past_threshold(space: UnitSpace, threshold: float | None) -> int:
    """Mark the trained entries of one support with |w + delta| at the threshold or above; returns how many."""
    base, weights = _weights(space)
    largest = base.abs().max()
    if threshold is None and largest == 0:
        # 9 % of an NF4 weight are exactly 0: a support of some of them would freeze whole at its first movement.
        threshold = smallest_beside_zero(space.base_weight())
    past = weights.abs() >= threshold if threshold is not None else weights.abs() > largest
    past &= space.trained()
    space.frozen[: past.numel()][past] = 1
    return int(past.sum())


def smallest_beside_zero(weight: Tensor) -> float:
    """The smallest |w| > 0; infinity where there is none."""
    rows = (part.abs().float() for part in weight.split(256))
    return min(float(torch.where(part > 0, part, torch.inf).min()) for part in rows)


def _weights(space: UnitSpace) -> tuple[Tensor, Tensor]:
    """Base weights at the living entries, and these plus the deltas, `[a]` fp32 both."""
    base = space.grid.gather(space.base_weight(), space.alive()).float()
    return base, base + space.living_values().float()
