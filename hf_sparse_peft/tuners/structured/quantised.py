r"""`Quantised`: matrices whose numbers are a few values, and `PackedMatrix`, what they are shipped as."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ...sparsity import pack_bits, unpack_bits
from ...utils.option_types import Range
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Tensors
from .matrices import DenseMatrix, Matrix

EPSILON = 1e-5
READING = ("down", "a")
"""Roles of the matrices that read a form's input."""
Bits = Annotated[int, Range(least=1, most=8)]


@cache
def codes_of(bits: int) -> tuple[Tensor, Tensor]:
    r"""The values `[2^bits]` that a standard normal number is rounded to, and the thresholds between them, float64:
    each value is the normal quantile of the middle of its bin's mass, each threshold the mean of its two values, found
    by iteration from 0 (1 bit: :math:`\pm\Phi^{-1}(3/4)`, which has the least absolute error, not the least square)."""
    values = torch.zeros(2**bits, dtype=torch.float64)
    for _ in range(500):
        mass = torch.special.ndtr((values[1:] + values[:-1]) / 2)
        mass = torch.cat([mass.new_zeros(1), mass, mass.new_ones(1)])
        values = torch.special.ndtri((mass[1:] + mass[:-1]) / 2)
    return values, (values[1:] + values[:-1]) / 2


@register_part("quantised")
@dataclass(frozen=True)
class Quantised(Matrix):
    r""":math:`M = q(z)\,\sigma + \mu` with :math:`z = (V - \mu) / (\sigma + 10^{-5})`, :math:`\mu` and :math:`\sigma`
    the mean and the standard deviation (of n - 1) of the trained V `[rows, cols]`, and q the nearest of
    :math:`2^{bits}` values (`codes_of`; Jie et al., 2023; official code JieShibo/PETL-ViT).

    The gradient passes q as if it were the identity, and :math:`\mu` and :math:`\sigma` as they are. A number on a
    threshold takes the upper value. `StructuredModel.pack` makes the adapter to ship, `bits` a number and two numbers a
    matrix.
    """

    bits: Bits = 1
    """Of a number."""
    first: Matrix = field(default_factory=partial(DenseMatrix, "kaiming"))
    """What V is in the matrix that reads."""
    last: Matrix = field(default_factory=DenseMatrix)
    """What V is in the one that writes: not 0, whose deviation is 0."""
    tensor_names: ClassVar[tuple[str, ...]] = ()

    def _of(self, role: str) -> Matrix:
        return self.first if role in READING else self.last

    @property
    def shared(self) -> tuple[str, ...]:
        """Those of V."""
        return tuple(dict.fromkeys((*self.first.shared, *self.last.shared)))

    def specs(self, role: str, rows: int, cols: int) -> list[TensorSpec]:
        """Those of V.

        Raises:
            ValueError: the matrix has one number, which has no deviation.
        """
        if rows * cols < 2:
            raise ValueError(f"Quantised needs two numbers or more, and its matrix is {rows} x {cols}.")
        return self._of(role).specs(role, rows, cols)

    def shared_specs(self) -> list[TensorSpec]:
        """Those of V."""
        return list({spec.name: spec for one in (self.first, self.last) for spec in one.shared_specs()}.values())

    def dense(self, role: str, rows: int, cols: int, tensors: Tensors) -> Tensor:
        """M; its numbers are exactly those of the packed matrix."""
        places, z, mean, deviation = self._quantised(role, rows, cols, tensors)
        values = codes_of(self.bits)[0].to(z)
        return (values[places] + (z - z.detach())) * deviation + mean

    def _quantised(self, role: str, rows: int, cols: int, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        V = self._of(role).dense(role, rows, cols, tensors)
        mean, deviation = V.mean(), V.std()
        z = (V - mean) / (deviation + EPSILON)
        return torch.bucketize(z.detach(), codes_of(self.bits)[1].to(z), right=True), z, mean, deviation

    @torch.no_grad()
    def packed(self, role: str, rows: int, cols: int, tensors: Tensors) -> Tensors:
        """The tensors of `PackedMatrix`."""
        places, _, mean, deviation = self._quantised(role, rows, cols, tensors)
        planes = [pack_bits((places >> bit) & 1 == 1) for bit in range(self.bits)]
        return {f"{role}_planes": torch.stack(planes), f"{role}_moments": torch.stack([mean, deviation]).float()}


@register_part("packed_matrix")
@dataclass(frozen=True)
class PackedMatrix(Matrix):
    """What `Quantised` is shipped as: `bits` bits a number and two numbers. Nothing of it trains. It is made by
    `StructuredModel.pack`, not at injection."""

    bits: Bits = 1
    """Of a number."""
    tensor_names: ClassVar[tuple[str, ...]] = ("planes", "moments")
    made_by: ClassVar[str | None] = "pack"

    def specs(self, role: str, rows: int, cols: int) -> list[TensorSpec]:
        """Planes uint8 `[bits, ceil(rows cols / 8)]`, the lowest bits first, and mean and deviation."""
        width, spare = -(-rows * cols // 8), -rows * cols % 8

        def check(tensor: Tensor, key: str) -> None:
            if spare and bool((tensor[:, -1] >> (8 - spare)).any()):
                raise ValueError(f"'{key}' has bits beyond its {rows} x {cols} numbers; the file is damaged.")

        planes = TensorSpec(f"{role}_planes", (self.bits, width), torch.uint8, "saved", check=check)
        return [planes, TensorSpec(f"{role}_moments", (2,), role="saved")]

    def dense(self, role: str, rows: int, cols: int, tensors: Tensors) -> Tensor:
        """M."""
        mean, deviation = tensors[f"{role}_moments"]
        places = torch.zeros(rows * cols, dtype=torch.long, device=mean.device)
        for bit, plane in enumerate(tensors[f"{role}_planes"]):
            places += unpack_bits(plane, rows * cols).long() << bit
        return (codes_of(self.bits)[0].to(mean)[places] * deviation + mean).view(rows, cols)
