"""`LowRank`: a product of two factors."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rules import UnitSpace
from ...sparsity import Statistic
from ...sparsity.decomposition import truncated_svd
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, Tensors
from .input_statistics import InputMoments
from .product import factor_product
from .spaces import FactorsSpace


@register_part("low_rank")
@dataclass(frozen=True)
class LowRank(Form):
    r"""Low rank, :math:`W \approx B A` with `B` `[rows, r]`, `A` `[r, cols]`: the truncated SVD
    :math:`U_r \Sigma_r V_r^\top`, whose singular values are split as :math:`\Sigma^{1/2}` on each side, or, with
    `weighting`, the one of least output error on data.

    With inputs of second moment :math:`S S^\top = \mathbb{E}[x x^\top]` that is the truncated SVD of :math:`W S`,
    multiplied by :math:`S^{-1}`.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("A", "B")
    unit_kinds: ClassVar[frozenset[str]] = frozenset({"factors"})

    trained: Literal["AB", "A", "B", ""] = "AB"
    """Which factors train; the others are frozen, in the base's dtype."""
    weighting: Literal["none", "diagonal", "full"] = "none"
    r"""What errors are weighted by: nothing, the root mean square of each input feature, or the inputs' second moment.
    The last two read data."""
    split: Literal["balanced", "B", "A"] = "balanced"
    r"""Where the singular values go: :math:`\Sigma^{1/2}` into each, or all of them into one factor."""
    examples: int = 128
    """Examples that inputs are read from."""

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """The factors."""
        shapes = {"A": (rank, cols), "B": (rows, rank)}
        return [TensorSpec(n, s, role="trained" if n in self.trained else "saved") for n, s in shapes.items()]

    @property
    def statistic(self) -> Statistic | None:
        """Second moments of the inputs."""
        if self.weighting == "none":
            return None
        return InputMoments(self.examples, full=self.weighting == "full")

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
        """The truncated SVD."""
        if state is None:
            U, S, Vh = truncated_svd(weight, rank)
        else:
            root, inverse = roots(state["second"].to(weight.dtype))
            U, S, Vh = truncated_svd(_times(weight, root), rank)
            Vh = _times(Vh, inverse)
        left, right = {"balanced": (S.sqrt(), S.sqrt()), "B": (S, None), "A": (None, S)}[self.split]
        return {"A": Vh if right is None else right[:, None] * Vh, "B": U if left is None else U * left}

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`(X A^\top) B^\top`."""
        return factor_product(factor_product(x, tensors["A"], dtype), tensors["B"], dtype)

    def weight(self, tensors: Tensors) -> Tensor:
        """B A."""
        return tensors["B"] @ tensors["A"]

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace]:
        """The product, where both factors train."""
        return [FactorsSpace(layer, adapter)] if self.trained == "AB" else []

    def modules(self, tensors: Tensors, bias: Tensor | None) -> nn.Module:
        """Two linear layers in a row, `down` (A) and `up` (B, with the bias)."""
        return linear_chain({"down": tensors["A"], "up": tensors["B"]}, bias)


def linear_chain(factors: Tensors, bias: Tensor | None) -> nn.Sequential:
    """Linear layers in a row with these weights `[out, in]`, by name; the last one has the bias."""
    chain = OrderedDict()
    for name, factor in factors.items():
        last = bias if name == list(factors)[-1] else None
        linear = nn.Linear(*reversed(factor.shape), bias=last is not None, device="meta")
        linear.weight = nn.Parameter(factor.detach().clone(), requires_grad=False)
        if last is not None:
            linear.bias = nn.Parameter(last.detach().to(factor.dtype).clone(), requires_grad=False)
        chain[name] = linear
    return nn.Sequential(chain)


def roots(second: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`S` with :math:`S S^\top` = `second` (`[n]`, a diagonal, or `[n, n]`), symmetric, and its pseudo-inverse:
    directions without a thousandth of the largest moment's rounding are left out of it."""
    if second.dim() == 1:
        values, vectors = second, None
    else:
        values, vectors = torch.linalg.eigh(second)
    values = values.clamp_min(0)
    kept = values > values.max() * torch.finfo(values.dtype).eps * len(values)
    root, inverse = values.sqrt(), torch.where(kept, values, torch.ones_like(values)).rsqrt() * kept
    if vectors is None:
        return root, inverse
    return (vectors * root) @ vectors.t(), (vectors * inverse) @ vectors.t()


def _times(matrix: Tensor, root: Tensor) -> Tensor:
    return matrix * root if root.dim() == 1 else matrix @ root
