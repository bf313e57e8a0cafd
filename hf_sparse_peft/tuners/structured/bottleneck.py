r"""`Bottleneck`: a small network with a skip connection behind a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ...utils.option_types import Fraction, PositiveFloat, PositiveInt
from ...utils.parts import register_part, require
from ...utils.tensors import TensorSpec
from ..shared.pieces import OutputMap, Piece
from .form import Behind, Call, Site, Tensors, Weight
from .matrices import DenseMatrix, MadeOfMatrices, Matrix, enter_roles
from .quantised import PackedMatrix

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}
enter_roles("down", "up")
NORM = ("layernorm_scale", "layernorm_shift")


@register_part("bottleneck")
@dataclass(frozen=True)
class Bottleneck(MadeOfMatrices, Behind):
    r""":math:`y' = y + s\,(M_2\,\phi(M_1 y + c_1) + c_2)` behind the layer, :math:`M_1` `[m, out]` (adapters;
    Houlsby et al., 2019).

    It stands between a sub-layer's last linear (attention's output, the FFN's second) and the sum with the residual
    stream. Where the base has dropout behind that linear (BERT), it acts on the adapter's output and not, as in the
    paper, on its input; without dropout, and in evaluation, both are one. With the `identity` as activation it is a map
    of the output, and merges.
    """

    size: PositiveInt | None = 64
    """m; None: by `reduction`."""
    reduction: PositiveInt | None = None
    """m = out / reduction, rounded down; None: by `size`."""
    activation: Literal["gelu", "gelu_new", "relu", "silu", "identity"] = "gelu"
    r""":math:`\phi`; `gelu_new` is the tanh approximation."""
    matrix: Matrix = field(default_factory=DenseMatrix)
    """How both matrices are made of numbers: DenseMatrix(), PHM(), TensorTrain(), ..."""
    biases: bool = True
    """Whether there are :math:`c_1` and :math:`c_2`, which start at 0."""
    scale: PositiveFloat = 1.0
    """s."""
    dropout: Fraction = 0.0
    """Of the activation's output, in training."""
    norm: bool = False
    """Whether what is added to y goes through a trained layer norm, which starts as the identity of normed numbers."""
    tensor_names: ClassVar[tuple[str, ...]] = ("down_bias", "up_bias", *NORM)
    shifts_bias: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        only = (self.size is None) != (self.reduction is None)
        require(only, self, "size", f"None with reduction= ({self.reduction}), or an integer without")
        require(self.dropout < 1, self, "dropout", "a number from 0 to below 1")

    @torch.no_grad()
    def packed(self, tensors: Tensors, site: Site) -> tuple[Bottleneck, Tensors]:
        """With packed matrices."""
        m, n = self.width(site), site.rows
        found = self.matrix.packed("down", m, n, tensors) | self.matrix.packed("up", n, m, tensors)
        return replace(self, matrix=PackedMatrix(self.matrix.bits)), found

    def width(self, site: Site) -> int:
        """m.

        Raises:
            ValueError: it would be 0.
        """
        found = self.size or site.rows // self.reduction
        if not found:
            raise ValueError(
                f"Bottleneck.reduction={self.reduction} leaves no width for the {site.rows} outputs of '{site.name}'. "
                "Lower it, or set size."
            )
        return found

    def specs(self, site: Site) -> list[TensorSpec]:
        """Both matrices, the biases, and at the owner what matrices share."""
        m, n = self.width(site), site.rows
        try:
            found = [*self.matrix.specs("down", m, n), *self.matrix.specs("up", n, m)]
        except ValueError as error:
            raise ValueError(f"'{site.name}' ({n} outputs, width {m}): {error}") from error
        found += [TensorSpec("down_bias", (m,)), TensorSpec("up_bias", (n,))] if self.biases else []
        if self.norm:
            found += [TensorSpec(NORM[0], (n,), start=lambda _: torch.ones(n)), TensorSpec(NORM[1], (n,))]
        return found + (self.matrix.shared_specs() if site.owns else [])

    def branch(self, y: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """The two products around the activation."""
        m, n = self.width(call.site), call.site.rows
        inner = self.matrix.product(y, "down", m, n, tensors, call)
        inner = inner + tensors["down_bias"].to(call.dtype) if self.biases else inner
        inner = F.dropout(ACTIVATIONS[self.activation](inner), self.dropout, call.training)
        found = self.matrix.product(inner, "up", n, m, tensors, call)
        found = found + tensors["up_bias"].to(call.dtype) if self.biases else found
        if self.norm:
            found = F.layer_norm(found, (n,), *(tensors[name].to(call.dtype) for name in NORM))
        return self.scale * found

    @property
    def linear(self) -> bool:
        """Whether it is a map of the output."""
        return self.activation == "identity" and not self.norm

    def pieces(self, tensors: Tensors, site: Site, weight: Weight) -> list[Piece]:
        """Of a linear one, the map that it is."""
        if not self.linear:
            return super().pieces(tensors, site, weight)
        return [OutputMap(lambda y: y + self._linear(y, tensors, site), weight)]

    def bias_change(self, tensors: Tensors, site: Site, bias: Tensor | None) -> Tensor | None:
        """Of a linear one, what it makes of the layer's bias and its own."""
        if not self.linear or (bias is None and not self.biases):
            return None
        start = torch.zeros(site.rows, device=next(iter(tensors.values())).device) if bias is None else bias.float()
        return self.branch(start, tensors, Call(site, torch.float32)).detach()

    def _linear(self, y: Tensor, tensors: Tensors, site: Site) -> Tensor:
        call = Call(site, y.dtype)
        return self.branch(y, tensors, call) - self.branch(torch.zeros_like(y[..., :1, :]), tensors, call)
