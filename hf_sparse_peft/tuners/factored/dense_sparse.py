"""`DenseSparse`: a dense dictionary times coefficients of which each column has few."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...sparsity.dense_sparse import dense_sparse, straight_through_sparse
from ...utils.option_types import PositiveFraction, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, Tensors
from .product import factor_product


@register_part("dense_sparse")
@dataclass(frozen=True)
class DenseSparse(Form):
    r"""Dense x semi-structured sparse: the rows of W are cut into blocks, and each row of a block is a sum of q of the
    k vectors of its dictionary, :math:`W_b^\top \approx D_b S_b` with q numbers in each column of S (DSFormer; Chand
    et al., 2023). With q = k and one block it is low rank; with less, rows lie in subspaces of their own.

    Both factors train. The coefficients are kept dense and used sparse: the forward pass takes the q largest of each
    column, and the gradient goes to all (the straight-through factorizer), so that others may take their place. There
    is no public code: that the latent is S, that rows are what is cut into blocks, and the start (orthogonal matching
    pursuit and least squares in turns) are our reading of the paper.

    The rank rule says k. What counts as stored are :math:`b\,k\,n` numbers of the dictionaries and, for each row, q
    numbers and their places; while it trains, and in its file, all k coefficients of a row are there.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("dictionary", "coefficients")

    nonzeros: PositiveFraction = 0.25
    """q, as a fraction of k; at least 1."""
    blocks: PositiveInt = 1
    """Blocks of rows; the largest number up to this that divides the rows."""
    rounds: PositiveInt = 15
    """Alternations of the start at most."""

    def count(self, rank: int) -> int:
        """q."""
        return max(1, round(self.nonzeros * rank))

    def blocks_of(self, rows: int) -> int:
        """Blocks that rows are cut into."""
        return next(blocks for blocks in range(min(self.blocks, rows), 0, -1) if rows % blocks == 0)

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """Dictionaries, a vector a row, and coefficients."""
        blocks = self.blocks_of(rows)
        return [
            TensorSpec("dictionary", (blocks * rank, cols)),
            TensorSpec("coefficients", (blocks, rank, rows // blocks)),
        ]

    def stored_numbers(self, rows: int, cols: int, rank: int) -> float:
        """As said above; a place takes log2(k) bits, a number 16."""
        places = math.ceil(math.log2(rank)) / 16 if self.count(rank) < rank else 0
        return self.blocks_of(rows) * rank * cols + rows * self.count(rank) * (1 + places)

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
        """Block after block."""
        parts = weight.chunk(self.blocks_of(len(weight)))
        found = [dense_sparse(part.t(), rank, self.count(rank), self.rounds) for part in parts]
        return {
            "dictionary": torch.cat([D.t() for D, _ in found]),
            "coefficients": torch.stack([S for _, S in found]),
        }

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`(X D_b) S_b`, block beside block."""
        S = self._sparse(tensors).to(dtype)
        inner = factor_product(x, tensors["dictionary"], dtype).unflatten(-1, S.shape[:2])
        return torch.einsum("...bk,bkc->...bc", inner, S).flatten(-2)

    def weight(self, tensors: Tensors) -> Tensor:
        """The dense product."""
        S = self._sparse(tensors)
        D = tensors["dictionary"].view(S.shape[0], S.shape[1], -1)
        return (S.transpose(1, 2) @ D).flatten(0, 1)

    def _sparse(self, tensors: Tensors) -> Tensor:
        latent = tensors["coefficients"]
        count = self.count(latent.shape[1])
        return latent if count == latent.shape[1] else straight_through_sparse(latent, count)
