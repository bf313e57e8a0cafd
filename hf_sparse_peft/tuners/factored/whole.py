"""`Whole`: the weight itself, as what trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rules import UnitSpace
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, Tensors
from .low_rank import linear_chain
from .product import factor_product
from .spaces import WholeSpace


@register_part("whole")
@dataclass(frozen=True)
class Whole(Form):
    """The weight itself, all of which trains, as an fp32 master: for rules that bring it to low rank before it is
    factored (`TrainedRankPruning`). It saves nothing, in memory or in files."""

    tensor_names: ClassVar[tuple[str, ...]] = ("W",)
    exact: ClassVar[bool] = True
    unit_kinds: ClassVar[frozenset[str]] = frozenset({"whole"})

    def own_rank(self, rows: int, cols: int) -> int:
        """The smaller side."""
        return min(rows, cols)

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """The weight."""
        return [TensorSpec("W", (rows, cols))]

    def start(
        self,
        weight: Tensor,
        rank: int,
        *,
        state: Tensors | None = None,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensors:
        """A copy."""
        return {"W": weight.clone()}

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`X W^\top`."""
        return factor_product(x, tensors["W"], dtype)

    def weight(self, tensors: Tensors) -> Tensor:
        """W."""
        return tensors["W"]

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace]:
        """The weight."""
        return [WholeSpace(layer, adapter)]

    def modules(self, tensors: Tensors, bias: Tensor | None) -> nn.Module:
        """One linear layer."""
        return linear_chain({"linear": tensors["W"]}, bias)[0]
