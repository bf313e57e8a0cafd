"""What SaRA does to a support during training, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.option_types import check_types
from .schedule_config import require


@dataclass
class FreezingConfig:
    r"""Entries whose weight has grown past the threshold stop training, once (SaRA's progressive adjustment; Hu et al.,
    2025).

    At step `round(at * T)` an entry with :math:`|w + \delta| \geq \tau` is frozen: it keeps what it learned and goes on
    adding to the weight. The others go on with fresh optimizer state.
    """

    at: float = 0.5
    """When, as a share of the run (SaRA: 2500 steps, about half of it)."""
    threshold: float | None = None
    r""":math:`\tau`; None: each matrix's own, the largest :math:`|w|` that its support began with, so that an entry
    freezes once it is larger than any that was chosen; where that is 0, as on a 4-bit base with more zeros than the
    support has entries, the smallest :math:`|w| > 0` of the matrix."""
    skip_step: bool = True
    """Whether the adjustment takes the place of its step's update, as published."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "FreezingConfig"
        require(0 < self.at < 1, name, "at", self.at, "a share of the run in (0, 1)")
        ok = self.threshold is None or self.threshold > 0
        require(ok, name, "threshold", self.threshold, "None or a number > 0")


@dataclass
class NuclearNormConfig:
    r"""A pull towards low rank on the trained entries: :math:`\lambda\,\|P \odot M\|_*` of one random matrix a step
    (SaRA; Hu et al., 2025), `P` the current weight and `M` the trained support.

    Its gradient :math:`\lambda\,(UV^\top) \odot M` is added once per optimizer step, after clipping; it never shows in
    the loss.
    """

    weight: float = 5e-4
    r""":math:`\lambda` (SaRA: 5e-4)."""
    min_side: int = 64
    """Matrices whose shorter side is not above this are left out (SaRA: 64)."""
    interval: int = 1
    """Optimizer steps between two additions (SaRA: 1). Each costs a full SVD of one matrix."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "NuclearNormConfig"
        require(self.weight > 0, name, "weight", self.weight, "a number > 0 (None as the option leaves it out)")
        require(self.min_side >= 0, name, "min_side", self.min_side, "an integer >= 0")
        require(self.interval >= 1, name, "interval", self.interval, "an integer >= 1")
