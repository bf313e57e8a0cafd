"""SaRA's nuclear norm, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.option_types import check_types
from .schedule_config import require


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
