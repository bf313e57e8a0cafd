r"""All weights in one random subspace: :math:`\Delta W_j = \lambda_j\,(P_j z)` with one trained point z for the whole
model and a fixed random projection :math:`P_j` for each weight, which follows from the seed and is in no file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops import autocast_off
from ...ops.seeded import seeded_permutation, seeded_uniform
from ...sparsity import stream_seed
from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .bases import Bases, Site
from .names import POINT, SCALE


@register_part("fastfood")
@dataclass(frozen=True)
class Fastfood(Bases):
    r"""One trained point for the whole adapter, projected to every weight by a Fastfood transform (intrinsic dimension;
    Li et al., 2018; Aghajanyan et al., 2021): no core, and updates that are dense matrices.

    With `structure_aware` each weight has a trained :math:`\lambda` that starts at 1 (SAID), and z has `dimension`
    numbers less one a weight; else :math:`\lambda = 1`. z starts at 0. Each pass builds a layer's update anew, forwards
    and backwards, in the memory of some matrices of the weight's size. Its gradient is the exact adjoint; the released
    code's is too small by 1/L, differently for weights of different sizes.
    """

    dimension: PositiveInt = 20_000
    """Trained numbers of the whole adapter (T5-base: 20,000)."""
    structure_aware: bool = True
    """Whether each weight has a trained factor."""
    dense: ClassVar[bool] = True
    drawn: ClassVar[bool] = True
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    shared: ClassVar[tuple[str, ...]] = (POINT,)

    def group(self, site: Site) -> Hashable:
        """All modules."""
        return ()

    def specs(self, site: Site) -> list[TensorSpec]:
        """The point at its owner, and a factor.

        Raises:
            ValueError: there are not enough numbers for a factor a weight.
        """
        factors = site.sharing.users if self.structure_aware else 0
        if self.dimension <= factors:
            raise ValueError(
                f"Fastfood.dimension={self.dimension} leaves no number beside the factors of {factors} weights. Raise "
                f"it above {factors}, or set structure_aware=False."
            )
        found = [TensorSpec(POINT, (self.dimension - factors,))] if site.owns else []
        if self.structure_aware:
            found.append(TensorSpec(SCALE, (1,), start=lambda _: torch.ones(1)))
        return found

    def projection(self, tensors: Mapping[str, Tensor], site: Site) -> Projection:
        """:math:`P_j` of the module."""
        return Projection(site.stream("P"), site.rows * site.cols, tensors[POINT].numel(), tensors[POINT].device)

    def update(self, tensors: Mapping[str, Tensor], site: Site) -> Tensor:
        """The update, fp32 `[out, in]`."""
        found = self.projection(tensors, site).project(tensors[POINT].float())
        return (found * tensors[SCALE] if self.structure_aware else found).view(site.rows, site.cols)

    def product(self, x: Tensor, tensors: Mapping[str, Tensor], site: Site, dtype: torch.dtype) -> Tensor:
        r""":math:`X\,\Delta W^\top`, `[..., out]` in `dtype`."""
        factor = tensors[SCALE] if self.structure_aware else torch.ones(1, device=tensors[POINT].device)
        return _Product.apply(x, tensors[POINT], factor, self.projection(tensors, site), site, dtype)


class Projection:
    r""":math:`P z = [H G \Pi H B z]_{1..D} / \sqrt{D \sum G^2}`, D numbers of d: `B` random signs, `H` the
    Walsh-Hadamard matrix, :math:`\Pi` a permutation, `G` standard normal, all of L numbers, the next power of two of
    the larger of D and d.

    Columns have norm 1 where D is L, and on average otherwise. B, G and the permutation are drawn at each use.
    """

    def __init__(self, seed: int, numel: int, dimension: int, device: torch.device) -> None:
        self.seed, self.numel, self.dimension, self.device = seed, numel, dimension, device
        self.length = 1 << (max(numel, dimension) - 1).bit_length()

    def _signs(self) -> Tensor:
        return seeded_uniform(stream_seed(self.seed, "B"), self.dimension, device=self.device).sign().clamp_(min=-1)

    def _normals(self) -> tuple[Tensor, float]:
        uniform = seeded_uniform(stream_seed(self.seed, "G"), self.length, device=self.device).add_(2.0**-24)
        G = uniform.erfinv_().mul_(2.0**0.5)
        return G, (self.numel * G.double().square().sum().item()) ** -0.5

    def _order(self) -> Tensor:
        return seeded_permutation(stream_seed(self.seed, "order"), self.length, self.device)

    def project(self, z: Tensor) -> Tensor:
        """P z, `[D]`, for fp32 `z` `[d]`."""
        G, scale = self._normals()
        mixed = hadamard(torch.nn.functional.pad(z * self._signs(), (0, self.length - self.dimension)))
        return hadamard(mixed[self._order()].mul_(G)).mul_(scale)[: self.numel]

    def adjoint(self, y: Tensor) -> Tensor:
        r""":math:`P^\top y`, `[d]`, for fp32 `y` `[D]`."""
        G, scale = self._normals()
        mixed = hadamard(torch.nn.functional.pad(y, (0, self.length - self.numel))).mul_(G)
        back = torch.empty_like(mixed)
        back[self._order()] = mixed
        return hadamard(back)[: self.dimension] * self._signs() * scale


def hadamard(x: Tensor) -> Tensor:
    """H x for `x` of a power of two numbers, without normalisation: H H = L."""
    span = 1
    while span < x.numel():
        pairs = x.view(-1, 2, span)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).view(-1)
        span *= 2
    return x


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, factor: Tensor, projection: Projection, site: Site, dtype: torch.dtype):
        ctx.save_for_backward(x, z, factor)
        ctx.projection, ctx.shape, ctx.dtype = projection, (site.rows, site.cols), dtype
        with autocast_off(x.device.type):
            return x.to(dtype) @ _Product._update(ctx, z, factor).t()

    @staticmethod
    def _update(ctx: Any, z: Tensor, factor: Tensor) -> Tensor:
        return (ctx.projection.project(z.float()) * factor.float()).view(ctx.shape).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        x, z, factor = ctx.saved_tensors
        dx = dz = dfactor = None
        with autocast_off(x.device.type):
            dy = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype)
            if ctx.needs_input_grad[0]:
                dx = (dy @ _Product._update(ctx, z, factor)).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                dW = (dy.t() @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)).float().view(-1)
                back = ctx.projection.adjoint(dW)
                dz = (back * factor.float()).to(z.dtype)
                dfactor = (back @ z.float()).view(1).to(factor.dtype)  # <P z, dW> = <z, P^T dW>
        return dx, dz, dfactor, None, None, None
