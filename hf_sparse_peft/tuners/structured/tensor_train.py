r"""`TensorTrain`: matrices as chains of small cores."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Tensors
from .lengths import balanced_factors
from .matrices import Matrix

LONGEST = 16
PUBLISHED = {
    (768, 8): (8, 8, 12, 8),
    (1024, 8): (4, 8, 8, 8, 4),
    (4096, 8): (16, 16, 8, 4, 4),
    (4096, 64): (16, 16, 16, 4, 4, 4),
}
"""Longer and shorter side -> lengths of the axes, from the released table."""


@register_part("tensor_train")
@dataclass(frozen=True)
class TensorTrain(Matrix):
    r""":math:`M^\top_{(i_1 \dots i_m)} = G_1[i_1] \cdots G_m[i_m]`: cores :math:`G_k` `[rank, n_k, rank]` (1 at both
    ends), :math:`\prod n_k` the numbers of the matrix, the chain read row by row as `[cols, rows]` (LoRETTA; Yang et
    al., 2024; official code yifanycc/loretta).

    Each core starts at :math:`N(0, 1)\,\sigma^{1/m} / \sqrt{\rho_k}` with :math:`\sigma^2 = 1 / (rows + cols)`, which
    gives every entry of M the variance :math:`\sigma^2`: no core is 0, so that the adapter is not the identity at its
    start, as published.
    """

    rank: PositiveInt = 5
    r""":math:`\rho`, between all cores."""
    shapes: dict[str, list[PositiveInt]] = field(default_factory=dict)
    """Sides "768x8", the longer first, -> lengths of the axes; else the released table's, else `order` of about one
    length."""
    order: PositiveInt = 4
    """Cores of a matrix that neither `shapes` nor the table has, at most as many as its size has prime factors."""
    zero_last: bool = False
    """Whether the last core starts at 0, so that the adapter starts as the identity (not published; in the first step
    no other core has a gradient)."""
    tensor_names: ClassVar[tuple[str, ...]] = tuple(f"core_{at}" for at in range(LONGEST))

    def axes(self, rows: int, cols: int) -> tuple[int, ...]:
        """Lengths of the axes.

        Raises:
            ValueError: `shapes` has others than make the matrix, or too many.
        """
        long, short = max(rows, cols), min(rows, cols)
        key = f"{long}x{short}"
        found = self.shapes.get(key) or PUBLISHED.get((long, short)) or _lengths(rows * cols, self.order)
        if math.prod(found) != rows * cols or len(found) > LONGEST:
            raise ValueError(
                f"TensorTrain.shapes[{key!r}]={list(found)} makes {math.prod(found)} numbers, and the matrix has "
                f"{rows * cols}. Give at most {LONGEST} lengths whose product that is."
            )
        return tuple(found)

    def specs(self, role: str, rows: int, cols: int) -> list[TensorSpec]:
        """The cores."""
        axes, deviation = self.axes(rows, cols), math.sqrt(1 / (rows + cols))

        def start(shape: tuple[int, int, int], generator: torch.Generator | None) -> Tensor:
            return torch.randn(shape, generator=generator) * deviation ** (1 / len(axes)) / math.sqrt(shape[2])

        found, last = [], len(axes) - 1
        for at, length in enumerate(axes):
            shape = (1 if at == 0 else self.rank, length, 1 if at == last else self.rank)
            zero = self.zero_last and at == last
            found.append(TensorSpec(f"{role}_core_{at}", shape, start=None if zero else partial(start, shape)))
        return found

    def dense(self, role: str, rows: int, cols: int, tensors: Tensors) -> Tensor:
        """The chain contracted."""
        count = len(self.axes(rows, cols))
        found = tensors[f"{role}_core_0"].flatten(0, 1)
        for at in range(1, count):
            core = tensors[f"{role}_core_{at}"]
            found = (found @ core.flatten(1)).view(-1, core.shape[2])
        return found.view(cols, rows).t()


def _lengths(size: int, order: int) -> tuple[int, ...]:
    return tuple(one for one in balanced_factors(size, order) if one > 1) or (1,)
