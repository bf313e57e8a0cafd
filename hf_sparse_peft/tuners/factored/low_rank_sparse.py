"""`LowRankSparse`: low rank beside a matrix whose rows leave while it trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rules import UnitSpace
from ...sparsity.decomposition import truncated_svd
from ...utils.option_types import PositiveFraction
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, Tensors
from .product import factor_product


@register_part("low_rank_sparse")
@dataclass(frozen=True)
class LowRankSparse(Form):
    r"""Low rank + structured sparse, :math:`W = B A + S`: B A the truncated SVD of rank
    :math:`\lceil \rho\, mn / (m + n) \rceil`, its singular values split as :math:`\Sigma^{1/2}` on each side, and S
    what is left, so that the form is the weight at the start. All train; rows of S (output neurons) are units of kind
    "row", which a rule takes away (`Allocate(spaces=("row",))`; LoSparse; Li et al., 2023).

    A row that does not live is 0 after each comparison; between two of them it trains on, and may come back. Once the
    last row has left it stays 0.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("A", "B", "S", "living")
    exact: ClassVar[bool] = True
    unit_kinds: ClassVar[frozenset[str]] = frozenset({"row"})

    low_rank: PositiveFraction = 0.05
    r""":math:`\rho`: numbers of A and B, by those of the weight."""

    def own_rank(self, rows: int, cols: int) -> int:
        """Rank of B A, which is never 0."""
        return min(math.ceil(self.low_rank * rows * cols / (rows + cols)), rows, cols)

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """The factors, S, and which of its rows live."""
        return [
            TensorSpec("A", (rank, cols)),
            TensorSpec("B", (rows, rank)),
            TensorSpec("S", (rows, cols)),
            TensorSpec("living", (rows,), torch.uint8, "saved", start=_ones(rows), check=_check_living),
        ]

    @torch.no_grad()
    def start(
        self,
        weight: Tensor,
        rank: int,
        *,
        state: Tensors | None = None,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensors:
        """The truncated SVD and the rest."""
        U, values, Vh = truncated_svd(weight, rank)
        A, B = values.sqrt()[:, None] * Vh, U * values.sqrt()
        living = torch.ones(len(weight), dtype=torch.uint8, device=weight.device)
        return {"A": A, "B": B, "S": weight - B @ A, "living": living}

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`(X A^\top) B^\top + X S^\top`."""
        low_rank = factor_product(factor_product(x, tensors["A"], dtype), tensors["B"], dtype)
        return low_rank + factor_product(x, tensors["S"], dtype)

    def weight(self, tensors: Tensors) -> Tensor:
        """B A + S."""
        return tensors["B"] @ tensors["A"] + tensors["S"]

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace]:
        """The rows of S."""
        return [RowSpace(layer, adapter)]


def _ones(rows: int) -> Any:
    return lambda _: torch.ones(rows, dtype=torch.uint8)


def _check_living(living: Tensor, key: str) -> None:
    if int(living.max()) > 1:
        raise ValueError(f"'{key}' says of each row whether it lives, 0 or 1, and has {int(living.max())}.")


@dataclass(frozen=True)
class RowSpace(UnitSpace):
    """Rows of the sparse part: row i of the update of the low rank dies with row i of S."""

    kind: ClassVar[str] = "row"
    unit: ClassVar[str] = "row"
    packed: ClassVar[bool] = False

    @property
    def S(self) -> nn.Parameter:
        """`[rows, cols]`."""
        return self.layer.form_tensors(self.adapter)["S"]

    @property
    def living(self) -> Tensor:
        """uint8 `[rows]`."""
        return self.layer.form_tensors(self.adapter)["living"]

    @property
    def size(self) -> int:
        """Rows."""
        return self.S.shape[0]

    capacity = size

    @property
    def unit_numel(self) -> int:
        """Numbers of a row."""
        return self.S.shape[1]

    unit_entries = unit_numel

    def alive(self) -> Tensor:
        """Rows that live, sorted."""
        return self.living.nonzero().squeeze(1)

    def parameters(self) -> list[nn.Parameter]:
        """S."""
        return [self.S]

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """S."""
        return {"S": (self.S, 0)}

    def write(self, units: Tensor) -> None:
        """Let the rows `units` live; the others are 0 from now on, in place."""
        living = self.living
        living.copy_(torch.zeros_like(living).index_fill_(0, units.long().to(living.device), 1))
        self.apply_mask()

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Zero the rows that do not live; an optimizer may have moved them."""
        self.S.data.masked_fill_((self.living == 0)[:, None], 0)
