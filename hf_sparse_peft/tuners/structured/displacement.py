r"""Updates of low displacement rank: circulant and Toeplitz matrices, multiplied by fast Fourier transforms.

On a square weight they are the published ones (SURM; Sehanobish et al., 2024; official code
arijitthegame/structured-matrices-PEFT, which takes no other). A weight `[out, in]` gets the upper left part of the
matrix of side :math:`d = \max(out, in)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...utils.option_types import PositiveFloat, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Additive, Call, Site, Tensors


@dataclass(frozen=True)
class _Displacement(Additive):
    """What they share: vectors of d numbers, products in fp32, which transforms ask for."""

    def vector(self, name: str, site: Site, std: float = 0.0, count: int | None = None) -> TensorSpec:
        """`[d]`, or `[count, d]`, N(0, std^2)."""
        shape = (max(site.rows, site.cols),)
        shape = shape if count is None else (count, *shape)

        def start(generator: torch.Generator | None) -> Tensor:
            return std * torch.randn(shape, generator=generator)

        return TensorSpec(name, shape, start=start if std else None)

    def transform(self, x: Tensor, tensors: Tensors) -> Tensor:
        """The product with the square matrix, `[..., d]` to `[..., d]`, fp32 or wider."""
        raise NotImplementedError

    def update(self, x: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """Padded, transformed, cut."""
        rows, cols = call.site.rows, call.site.cols
        wide = torch.promote_types(x.dtype, torch.float32)
        found = self.transform(F.pad(x.to(wide), (0, max(rows - cols, 0))), tensors)
        return found[..., :rows].to(x.dtype)

    def weight(self, tensors: Tensors, site: Site) -> Tensor:
        """The transform of the unit vectors."""
        first = next(iter(tensors.values()))
        eye = torch.eye(site.cols, max(site.rows, site.cols), dtype=first.dtype, device=first.device)
        wide = torch.promote_types(first.dtype, torch.float32)
        return self.transform(eye.to(wide), {k: t.to(wide) for k, t in tensors.items()})[:, : site.rows].t()


@register_part("circulant")
@dataclass(frozen=True)
class Circulant(_Displacement):
    r""":math:`\Delta W = s\,C(b \odot a)`, the one circulant with first column :math:`b \odot a`, a from N(0, 1) and b
    from 0: 2 d numbers, of which d are free. It is not C(b) C(a)."""

    product: bool = True
    """Whether it is the product of two vectors; else C(a) with an a that starts at 0."""
    scale: PositiveFloat = 1.0
    """s."""
    tensor_names: ClassVar[tuple[str, ...]] = ("circulant_a", "circulant_b")

    def specs(self, site: Site) -> list[TensorSpec]:
        """a and b."""
        if not self.product:
            return [self.vector("circulant_a", site)]
        return [self.vector("circulant_a", site, 1.0), self.vector("circulant_b", site)]

    def transform(self, x: Tensor, tensors: Tensors) -> Tensor:
        """A circular convolution."""
        column = tensors["circulant_a"]
        column = tensors["circulant_b"] * column if self.product else column
        return self.scale * circular(column.to(x.dtype), x)


@register_part("toeplitz")
@dataclass(frozen=True)
class Toeplitz(_Displacement):
    r""":math:`\Delta W = s\,T(b)\,T(a)`, a product of two symmetric Toeplitz matrices :math:`T(a)_{ij} = a_{|i - j|}`,
    a from N(0, 0.02^2) and b from 0: 2 d numbers."""

    std: PositiveFloat = 0.02
    """Of a."""
    scale: PositiveFloat = 1.0
    """s."""
    tensor_names: ClassVar[tuple[str, ...]] = ("toeplitz_a", "toeplitz_b")

    def specs(self, site: Site) -> list[TensorSpec]:
        """a and b."""
        return [self.vector("toeplitz_a", site, self.std), self.vector("toeplitz_b", site)]

    def transform(self, x: Tensor, tensors: Tensors) -> Tensor:
        """One Toeplitz product after the other."""
        a, b = tensors["toeplitz_a"].to(x.dtype), tensors["toeplitz_b"].to(x.dtype)
        return self.scale * symmetric_toeplitz(b, symmetric_toeplitz(a, x))


@register_part("displacement")
@dataclass(frozen=True)
class LowDisplacement(_Displacement):
    r""":math:`\Delta W = s \sum_{k=1}^{terms} C(c_k)\,S(s_k)`: circulants, from 0, times skew-circulants, whose entries
    above the diagonal are negated, from N(0, 0.02^2): 2 d numbers a term."""

    terms: PositiveInt = 1
    """Summands."""
    std: PositiveFloat = 0.02
    """Of s."""
    scale: PositiveFloat = 1.0
    """The factor s."""
    tensor_names: ClassVar[tuple[str, ...]] = ("circulants", "skew_circulants")

    def specs(self, site: Site) -> list[TensorSpec]:
        """`[terms, d]` both."""
        vector = partial(self.vector, site=site, count=self.terms)
        return [vector("circulants"), vector("skew_circulants", std=self.std)]

    def transform(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Term after term."""
        found = 0.0
        for column, skew in zip(tensors["circulants"].to(x.dtype), tensors["skew_circulants"].to(x.dtype), strict=True):
            found = found + circular(column, skew_circular(skew, x))
        return self.scale * found


def circular(column: Tensor, x: Tensor) -> Tensor:
    r""":math:`C x`, :math:`C_{ij} = c_{(i - j) \bmod d}`, for `column` `[d]` and `x` `[..., d]`."""
    d = column.shape[0]
    return torch.fft.irfft(torch.fft.rfft(column) * torch.fft.rfft(x), n=d)  # n: or an odd d would lose one


def skew_circular(column: Tensor, x: Tensor) -> Tensor:
    r""":math:`S x`, :math:`S_{ij} = s_{i - j}` for :math:`i \ge j` and :math:`-s_{d + i - j}` above: what a whole
    convolution has beyond d comes back with the other sign."""
    d = column.shape[0]
    whole = torch.fft.irfft(torch.fft.rfft(column, n=2 * d) * torch.fft.rfft(x, n=2 * d), n=2 * d)
    return whole[..., :d] - whole[..., d:]


def symmetric_toeplitz(row: Tensor, x: Tensor) -> Tensor:
    r""":math:`T x`, :math:`T_{ij} = r_{|i - j|}`: a part of a circulant of a power of two."""
    d = row.shape[0]
    length = 1 << (2 * d - 1).bit_length()
    column = torch.cat([row, row.new_zeros(length - 2 * d + 1), row[1:].flip(0)])
    return circular(column, F.pad(x, (0, length - d)))[..., :d]
