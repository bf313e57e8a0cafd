"""The product with a weight of which some groups of neighbours are kept, as integers with a scale and a zero point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast_off


def group_product(
    x: Tensor, held: Tensor, scales: Tensor, zeros: Tensor, kept: Tensor, bits: int, dtype: torch.dtype
) -> Tensor:
    r""":math:`X \hat W^\top` in `dtype`, with :math:`\hat W` as in `group_weight`.

    With codes as `held`, scales and zero points have gradients, :math:`\sum G (q - z)` and :math:`-s \sum G` over a
    group, :math:`G = \partial L / \partial \hat W`. With weights as `held`, which are rounded in each pass, gradients
    pass the rounding as if it were not there: inside of the range :math:`\partial w = G`,
    :math:`\partial s = \sum G ((q - z) - w / s)` and none of the zero point; of what is clipped none of w,
    :math:`\partial s = \sum G (q - z)` and :math:`\partial z = -s \sum G`.

    Kept for the backward pass: `x` in its own dtype and the tensors; dense matrices of the weight's shape live for one
    layer at a time.

    Args:
        x: `[..., cols]`.
        held: `[K, size]`, floating point weights or uint8 codes.
        scales: `[K]`, s.
        zeros: `[K]`, zero points z, real numbers.
        kept: bool `[rows, cols / size]`, K of which are True.
        bits: b.
        dtype: of the product.
    """
    return _GroupProduct.apply(x, held, scales, zeros, kept, bits, dtype)


def group_weight(held: Tensor, scales: Tensor, zeros: Tensor, kept: Tensor, bits: int) -> Tensor:
    r"""The dense `[rows, cols]` weight, in the scales' dtype: :math:`\hat w = s (q - z)` in the groups that are kept,
    0 elsewhere. See `group_product` for shapes."""
    codes = held if not held.is_floating_point() else group_codes(held, scales, zeros, bits)
    values = scales[:, None] * (codes.to(scales.dtype) - zeros[:, None])
    dense = values.new_zeros(kept.numel(), held.shape[1])
    return dense.index_copy_(0, _places(kept, len(held)), values).view(len(kept), -1)


def group_codes(weights: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    r""":math:`q = \mathrm{clip}(\mathrm{round}(w / s + z), 0, 2^b - 1)`, halves to even, `[K, size]` in the weights'
    dtype."""
    return _scaled(weights, scales, zeros).round_().clamp_(0, 2**bits - 1)


def _places(kept: Tensor, count: int) -> Tensor:
    """int64 `[count]`: which of all groups are kept. On the meta device, where memory is followed, only how many."""
    return kept.new_empty(count, dtype=torch.long) if kept.is_meta else kept.flatten().nonzero().squeeze(1)


def _scaled(weights: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    smallest = torch.finfo(scales.dtype).tiny  # a scale that training brought to 0 divides nothing
    return weights / torch.where(scales == 0, smallest, scales)[:, None] + zeros[:, None]


class _GroupProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: Tensor, scales: Tensor, zeros: Tensor, kept: Tensor, bits: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, held, scales, zeros, kept)
        ctx.bits, ctx.dtype = bits, dtype
        with autocast_off(x.device.type):
            return x.to(dtype) @ group_weight(held, scales, zeros, kept, bits).to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, held, scales, zeros, kept = ctx.saved_tensors
        dtype, dx, trained = ctx.dtype, None, (None, None, None)
        with autocast_off(x.device.type):
            gradient = gradient.to(dtype)
            if ctx.needs_input_grad[0]:
                dx = (gradient @ group_weight(held, scales, zeros, kept, ctx.bits).to(dtype)).to(x.dtype)
            if any(ctx.needs_input_grad[1:4]):
                dense = gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, x.shape[-1]).to(dtype)
                dense = dense.view(kept.numel(), -1)
                G = dense[_places(kept, len(held))].to(scales.dtype)  # sums of many: in the masters' dtype
                trained = _gradients(G, held, scales, zeros, ctx.bits)
        return dx, *trained, None, None, None


def _gradients(G: Tensor, held: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor | None, ...]:
    """Of `held`, scales and zero points."""
    if not held.is_floating_point():
        return None, (G * (held.to(G.dtype) - zeros[:, None])).sum(1), -scales * G.sum(1)
    scaled = _scaled(held, scales, zeros)
    codes = scaled.round().clamp_(0, 2**bits - 1)
    inside = (scaled.round() == codes).to(G.dtype)
    ds = (G * (codes - zeros[:, None] - inside * (scaled - zeros[:, None]))).sum(1)
    return (G * inside).to(held.dtype), ds, -scales * (G * (1 - inside)).sum(1)
