"""`Spectral`: a weight as all of its singular values and vectors, of which the values and a few vectors train."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...ops.spectral_product import spectral_product
from ...rules import UnitSpace
from ...utils.option_types import Fraction, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, Tensors


@register_part("spectral")
@dataclass(frozen=True)
class Spectral(Form):
    r"""The whole SVD, :math:`W = U \mathrm{diag}(\sigma) V^\top` with :math:`k = \min(m, n)` triplets, exact at the
    start (Sparse Spectral Training; Zhao et al., 2024). All :math:`\sigma` train, and r columns of U and V, which the
    rule `SampleVectors` draws anew; without it they stay those that are drawn at the start.

    Gradients of the vectors are the paper's enhanced ones, without the factor :math:`\sigma_i`
    (`ops.spectral_product`). It stores more than the weight, :math:`(k + r)(m + n) + k` numbers in fp32: what
    shrinks is what trains, with its optimizer state, to :math:`k + r(m + n)`. Merge it at the end.
    """

    tensor_names: ClassVar[tuple[str, ...]] = (
        "values", "left_active", "right_active", "left", "right", "active",
    )  # fmt: skip
    exact: ClassVar[bool] = True
    full_precision: ClassVar[frozenset[str]] = frozenset({"left", "right"})
    unit_kinds: ClassVar[frozenset[str]] = frozenset({"vector"})

    r: PositiveInt = 64
    """Vectors that train at a time, at most the smaller side."""
    floor: Fraction = 0.5
    r"""c of the chances :math:`p_i = c / k + (1 - c)\,\sigma_i / \sum \sigma`. Accounts of the paper differ, half or
    none; at 0 a direction whose value is 0 is never drawn again."""

    def own_rank(self, rows: int, cols: int) -> int:
        """Vectors that train."""
        return min(self.r, rows, cols)

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """Values, the vectors that train, and all others, a row each; vectors that train are 0 among these."""
        k = min(rows, cols)
        check = partial(_check_active, size=k)
        return [
            TensorSpec("values", (k,)),
            TensorSpec("left_active", (rank, rows)),
            TensorSpec("right_active", (rank, cols)),
            TensorSpec("left", (k, rows), role="saved"),
            TensorSpec("right", (k, cols), role="saved"),
            TensorSpec("active", (rank,), torch.int32, "saved", start=_first(rank), check=check),
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
        """The SVD, and the first draw."""
        U, values, Vh = torch.linalg.svd(weight, full_matrices=False)
        tensors = {"values": values, "left": U.t().contiguous(), "right": Vh.contiguous()}
        units = draw_vectors(values, rank, self.floor, generator)
        at = units.to(weight.device)
        for side in ("left", "right"):
            tensors[f"{side}_active"] = tensors[side][at]
            tensors[side][at] = 0
        return tensors | {"active": units.to(torch.int32)}

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """The vectors that train beside all others."""
        values = tensors["values"]
        others = spectral_product(x, tensors["left"].t(), tensors["right"].t(), values, dtype)
        trained = values.index_select(0, tensors["active"])
        left, right = tensors["left_active"].t(), tensors["right_active"].t()
        return others + spectral_product(x, left, right, trained, dtype)

    def weight(self, tensors: Tensors) -> Tensor:
        r""":math:`U \mathrm{diag}(\sigma) V^\top`."""
        values, active = tensors["values"], tensors["active"].long()
        trained = (tensors["left_active"].t() * values[active]) @ tensors["right_active"]
        return (tensors["left"].t() * values) @ tensors["right"] + trained

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace]:
        """The singular vectors."""
        return [VectorSpace(layer, adapter)]


def draw_vectors(values: Tensor, count: int, floor: float, generator: torch.Generator | None) -> Tensor:
    """`count` of the triplets without replacement, int64 and sorted, on the CPU; see `Spectral.floor`."""
    sizes = values.detach().double().abs().cpu()
    total = float(sizes.sum())
    shares = sizes / total if total > 0 else torch.full_like(sizes, 1 / len(sizes))
    weights = floor / len(sizes) + (1 - floor) * shares
    # multinomial refuses more draws than there are chances.
    weights = weights if int((weights > 0).sum()) >= count else weights + 1e-12
    return torch.multinomial(weights, count, generator=generator).sort().values


def _first(rank: int) -> Any:
    return lambda _: torch.arange(rank, dtype=torch.int32)


def _check_active(active: Tensor, key: str, size: int) -> None:
    if int(active.min()) < 0 or int(active.max()) >= size or bool((active.diff() <= 0).any()):
        raise ValueError(f"'{key}' is {active.tolist()}, no sorted choice of {size} vectors. The file is damaged.")


@dataclass(frozen=True)
class VectorSpace(UnitSpace):
    """Singular vectors, of which the active ones train."""

    kind: ClassVar[str] = "vector"
    unit: ClassVar[str] = "vector"

    def _held(self, name: str) -> Tensor:
        return self.layer.form_tensors(self.adapter)[name]

    @property
    def values(self) -> nn.Parameter:
        """`[k]`, singular values."""
        return self._held("values")

    @property
    def size(self) -> int:
        """Triplets."""
        return self.values.numel()

    @property
    def capacity(self) -> int:
        """Vectors that train at a time."""
        return self._held("active").numel()

    @property
    def unit_numel(self) -> int:
        """Numbers of a triplet that train while it is active, beside its value."""
        return sum(self.weight_shape)

    def alive(self) -> Tensor:
        """Triplets that train, sorted."""
        return self._held("active").long()

    def parameters(self) -> list[nn.Parameter]:
        """Values, left and right vectors."""
        return [self.values, *self.vectors()]

    def vectors(self) -> list[nn.Parameter]:
        """Left and right vectors that train, `[r, rows]` and `[r, cols]`."""
        return [self._held("left_active"), self._held("right_active")]

    def parameter_axes(self) -> list[tuple[nn.Parameter, int]]:
        """Left and right vectors, a row each."""
        return [(parameter, 0) for parameter in self.vectors()]

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """Left and right vectors."""
        return dict(zip(("left", "right"), self.parameter_axes(), strict=True))

    @torch.no_grad()
    def write(self, units: Tensor) -> None:
        """Let the vectors `units` train; those that did go back to the others."""
        active = self._held("active")
        old, new = active.long(), units.long().to(active.device)
        for side, trained in zip(("left", "right"), self.vectors(), strict=True):
            others = self._held(side)
            others[old] = trained.data
            trained.data.copy_(others[new])
            others[new] = 0
        active.copy_(new)

    def draw(self, generator: torch.Generator) -> Tensor:
        """As many triplets as train at a time, drawn with the form's probabilities."""
        return draw_vectors(self.values, self.capacity, self.layer.form(self.adapter).floor, generator)

    @torch.no_grad()
    def normalise(self) -> None:
        """Give the vectors that train unit length, and values below 0 the value 0."""
        for vectors in self.vectors():
            norms = vectors.data.norm(dim=1, keepdim=True)
            vectors.data.div_(torch.where(norms > 0, norms, torch.ones_like(norms)))
        self.values.data.clamp_min_(0)

    @torch.no_grad()
    def decompose(self) -> None:
        """Take the SVD of the weight as it is now: the vectors are orthonormal again; the same triplets train."""
        tensors = self.layer.form_tensors(self.adapter)
        weight = self.layer.form(self.adapter).weight(tensors)
        U, values, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        active = self.alive()
        self.values.data.copy_(values)
        for side, found, trained in zip(("left", "right"), (U.t(), Vh), self.vectors(), strict=True):
            others = self._held(side)
            others.copy_(found)
            trained.data.copy_(others[active])
            others[active] = 0
