"""`OutputFeatures`: low rank by what flows out of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...rules import UnitSpace
from ...sparsity import Statistic
from ...sparsity.decomposition import truncated_svd
from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, Tensors
from .input_statistics import InputMoments
from .low_rank import linear_chain
from .product import factor_product
from .spaces import FactorsSpace


@register_part("output_features")
@dataclass(frozen=True)
class OutputFeatures(Form):
    r"""Low rank by the outputs on data (LoRD; Kaushal et al., 2023): :math:`W \approx B A` with
    :math:`A = V_r^\top W`, :math:`B = V_r`, the leading eigenvectors of the covariance of :math:`y = W x + b`, and the
    bias :math:`V_r V_r^\top b + (I - V_r V_r^\top)\,\bar y`.

    Of all projections of rank r of the output it has the least mean squared error on that data, the sum of the
    eigenvalues that are left out, and the mean output is exact. The covariance follows from the inputs' moments,
    :math:`W (\mathbb{E}[x x^\top] - \bar x \bar x^\top) W^\top`.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("A", "B", "bias")
    unit_kinds: ClassVar[frozenset[str]] = frozenset({"factors"})

    center: bool = True
    """Whether outputs are taken about their mean, which goes into a bias. Without, the moment about 0 is taken and the
    layer's own bias stays: for architectures without biases, which files of dense models have no place for."""
    trained: Literal["AB", "A", "B", ""] = "AB"
    """Which factors train; the others and the bias are frozen, in the base's dtype."""
    examples: PositiveInt = 128
    """Examples that inputs are read from."""

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """The factors, and the bias where outputs are centred."""
        shapes = {"A": (rank, cols), "B": (rows, rank)}
        found = [TensorSpec(n, s, role="trained" if n in self.trained else "saved") for n, s in shapes.items()]
        return [*found, TensorSpec("bias", (rows,), role="saved")] if self.center else found

    def stored_numbers(self, rows: int, cols: int, rank: int) -> int:
        """Numbers of the factors; a bias is no part of a weight."""
        return rank * (rows + cols)

    @property
    def statistic(self) -> Statistic:
        """Moments of the inputs."""
        return InputMoments(self.examples)

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
        """The projection on the leading eigenvectors; on those of :math:`W W^\top` where data says nothing."""
        own = weight.new_zeros(len(weight)) if bias is None else bias
        if state is None:
            V, mean = truncated_svd(weight, rank)[0], own
        else:
            W, second, mean_x = weight.double(), state["second"].double(), state["mean"].double()
            covariance = second - torch.outer(mean_x, mean_x) if self.center else second
            V = torch.linalg.eigh(W @ covariance @ W.t())[1].flip(1)[:, :rank].to(weight.dtype)
            mean = (W @ mean_x).to(weight.dtype) + own
        found = {"A": V.t() @ weight, "B": V}
        return found | ({"bias": mean - V @ (V.t() @ (mean - own))} if self.center else {})

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`(X A^\top) B^\top`."""
        return factor_product(factor_product(x, tensors["A"], dtype), tensors["B"], dtype)

    def weight(self, tensors: Tensors) -> Tensor:
        """B A."""
        return tensors["B"] @ tensors["A"]

    def bias(self, tensors: Tensors, own: Tensor | None) -> Tensor | None:
        """That of the projection where outputs are centred, else the layer's own."""
        return tensors.get("bias", own)

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace]:
        """The product, where both factors train."""
        return [FactorsSpace(layer, adapter)] if self.trained == "AB" else []

    def modules(self, tensors: Tensors, bias: Tensor | None) -> nn.Module:
        """Two linear layers in a row, `down` (A) and `up` (B, with the bias)."""
        return linear_chain({"down": tensors["A"], "up": tensors["B"]}, bias)
