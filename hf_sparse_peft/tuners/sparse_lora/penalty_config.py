"""What pulls on a support's values during training, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...utils.option_types import check_types
from .schedule_config import require


@dataclass
class L1PenaltyConfig:
    r"""A pull to the start, :math:`\lambda \sum |p - p_0| / P` over trained numbers, `P` all numbers of the model
    (LT-SFT; Ansell et al., 2022).

    Its gradient is added once per optimizer step, after clipping, whatever the accumulation. It never shows in the
    loss. The support's changes start at 0; a head of `modules_to_save` starts at the weights that peft keeps beside it:
    where the base draws its head anew, draw it from the same seed to resume a run. A low-rank half is not pulled.
    """

    weight: float = 0.1
    r""":math:`\lambda` (LT-SFT: 0.1 for languages; tasks have none)."""
    scope: Literal["trained", "support"] = "trained"
    """Whether heads of `modules_to_save` are pulled too, or the support's changes only."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "L1PenaltyConfig"
        require(self.weight > 0, name, "weight", self.weight, "a number > 0 (None as the option leaves it out)")
        require(self.scope in ("trained", "support"), name, "scope", self.scope, "'trained' or 'support'")
