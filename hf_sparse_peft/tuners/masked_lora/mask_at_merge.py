"""A mask that merging applies and training does not know of (PERP's LoRA-Prune)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.parts import register_part
from .masking import Masking
from .weight import MaskedWeight


@register_part("at_merge")
@dataclass(frozen=True)
class MaskAtMerge(Masking):
    r"""Trains as :math:`W + D`, dense, and merges as :math:`W + M \odot D` (LoRA-Prune of PERP; Zimmer et al., 2023).

    What is merged is not what was trained: the loss of training is that of a model which nobody exports. `HardMask()`
    (MaskLoRA) trains what it merges.
    """

    def mask(self, of: MaskedWeight) -> Tensor:
        """All of it, in forward and backward."""
        return torch.ones_like(of.kept)
