"""A trained matrix and scales of column blocks: the weights of CAST."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .updates import DenseUpdate
from .weight import MaskedWeight


@register_part("scaled_dense")
@dataclass(frozen=True)
class ScaledDenseUpdate(DenseUpdate):
    r"""Full fine-tuning with a scale for each of `groups` blocks of consecutive inputs in each row:
    :math:`W + D = (W + \Delta) \odot S`, :math:`\Delta` `[out, in]` from 0, `S` `[out, groups]` from 1 (CAST; Huang et
    al., 2025). The scales let what is kept make up for what decays; merging folds them in."""

    groups: PositiveInt = 2
    """Blocks of a row (CAST: 2)."""

    trained: ClassVar[tuple[str, ...]] = ("delta", "scales")
    needs_base: ClassVar[bool] = True

    def check_weight(self, rows: int, cols: int, name: str) -> None:
        """Blocks divide the inputs."""
        if cols % self.groups:
            raise ValueError(
                f"ScaledDenseUpdate.groups={self.groups} does not divide the {cols} inputs of '{name}'. Choose another "
                "number, or name the module in exclude_modules."
            )

    def specs(self, config: Any, rows: int, cols: int) -> list[TensorSpec]:
        """`delta` and `scales`."""
        ones = TensorSpec("scales", (rows, self.groups), start=lambda _: torch.ones(rows, self.groups))
        return [*super().specs(config, rows, cols), ones]

    def delta(self, of: MaskedWeight) -> Tensor:
        r""":math:`(W + \Delta) \odot S - W`."""
        scales = of.tensors["scales"]
        wide = scales.repeat_interleave(of.shape[1] // scales.shape[1], dim=1)
        return (of.base + of.tensors["delta"]) * wide - of.base
