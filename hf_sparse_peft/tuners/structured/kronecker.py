r"""`Kronecker`: an update that is a Kronecker product of two trained matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...utils.option_types import PositiveFloat, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Additive, Call, Site, Tensors, times


@register_part("kronecker")
@dataclass(frozen=True)
class Kronecker(Additive):
    r""":math:`\Delta W = s\,A \otimes B` with trained A `[a1, a2]` and B `[out / a1, in / a2]`, which is never
    built in a pass: :math:`\Delta W x = \mathrm{vec}(A\,X B^\top)` with x as X `[a2, in / a2]` (DiffuseKronA; Marjit et
    al., 2025; SURM's Kronecker; Sehanobish et al., 2024).

    It has rank `rank(A) rank(B)`, at most :math:`\min(a_1, a_2) \min(out / a_1, in / a_2)`, and leaves as a LoRA of
    that, exactly, where that is below both sides of the weight.
    """

    rows: PositiveInt = 64
    """Rows of the factor that `rows_of` names."""
    cols: PositiveInt = 8
    """Columns of A, a2."""
    rows_of: Literal["first", "second"] = "first"
    """Whose rows `rows` are: A's (a1), or B's (out / a1)."""
    zero: Literal["first", "second"] = "second"
    """The factor that starts at 0."""
    init: Literal["normal", "kaiming"] = "normal"
    """Of the other one: N(0, 1 / rows^2), or Kaiming-uniform as LoRA's A, U(-1, 1) / sqrt(columns)."""
    scale: PositiveFloat = 1.0
    """s."""
    layout: Literal["kron", "released"] = "kron"
    """`released`: the outputs in the order of B (x) A, as DiffuseKronA's published layer has them: entry p a1 + q of
    the output is entry q (out / a1) + p of the product's."""
    tensor_names: ClassVar[tuple[str, ...]] = ("first", "second")

    def sides(self, site: Site) -> tuple[int, int, int, int]:
        """a1, a2, out / a1, in / a2.

        Raises:
            ValueError: `rows` or `cols` does not divide the side; names the module.
        """
        for name, count, side, length in (
            ("rows", self.rows, "outputs", site.rows),
            ("cols", self.cols, "inputs", site.cols),
        ):
            if length % count:
                raise ValueError(
                    f"Kronecker.{name}={count} does not divide the {length} {side} of '{site.name}'. Choose a divisor, "
                    "or leave the module out with exclude_modules."
                )
        a1 = self.rows if self.rows_of == "first" else site.rows // self.rows
        return a1, self.cols, site.rows // a1, site.cols // self.cols

    def specs(self, site: Site) -> list[TensorSpec]:
        """Both factors."""
        a1, a2, b1, b2 = self.sides(site)

        def spec(name: str, rows: int, cols: int) -> TensorSpec:
            def start(generator: torch.Generator | None) -> Tensor:
                if self.init == "kaiming":
                    return nn.init.kaiming_uniform_(torch.empty(rows, cols), math.sqrt(5), generator=generator)
                return torch.randn(rows, cols, generator=generator) / rows

            return TensorSpec(name, (rows, cols), start=None if name == self.zero else start)

        return [spec("first", a1, a2), spec("second", b1, b2)]

    def update(self, x: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """Two small products, in the order that costs less."""
        A, B = tensors["first"].to(call.dtype), tensors["second"].to(call.dtype)
        (a1, a2), (b1, b2) = A.shape, B.shape
        X = x.reshape(*x.shape[:-1], a2, b2)
        first = a1 * a2 * b2 + a1 * b2 * b1 <= a2 * b2 * b1 + a1 * a2 * b1
        if first:
            Y = times(times(X.transpose(-1, -2), A).transpose(-1, -2), B)
            Y = Y.transpose(-1, -2) if self.layout == "released" else Y
        else:
            Y = times(times(X, B).transpose(-1, -2), A)
            Y = Y if self.layout == "released" else Y.transpose(-1, -2)
        return self.scale * Y.reshape(*x.shape[:-1], a1 * b1)

    def weight(self, tensors: Tensors, site: Site) -> Tensor:
        """The product, its rows shuffled in the released layout."""
        A, B = tensors["first"], tensors["second"]
        return self._laid_out(self.scale * torch.kron(A, B), A.shape[0])

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        r""":math:`A \otimes B = (U_A \otimes U_B)(V_A \otimes V_B)`, one of the two in each being the identity."""
        A, B = tensors["first"], tensors["second"]
        if min(A.shape) * min(B.shape) >= min(site.rows, site.cols):
            return None
        (left, right), (down, up) = _split(A), _split(B)
        return self._laid_out(self.scale * torch.kron(left, down), A.shape[0]), torch.kron(right, up)

    def _laid_out(self, matrix: Tensor, a1: int) -> Tensor:
        if self.layout == "kron":
            return matrix
        return matrix.view(a1, -1, matrix.shape[1]).transpose(0, 1).reshape(matrix.shape)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors of the matrix, one of them the identity of its smaller side."""
    rows, cols = matrix.shape
    eye = torch.eye(min(rows, cols), dtype=matrix.dtype, device=matrix.device)
    return (eye, matrix) if rows <= cols else (matrix, eye)
