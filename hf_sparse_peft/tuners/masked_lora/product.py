"""The product of activations with a masked low-rank update, which is built in each pass and kept in none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops import autocast_off
from ...sparsity import unpack_bits


def masked_update(A: Tensor, B: Tensor, mask: Tensor, scale: float) -> Tensor:
    r""":math:`s\,M \odot (B A)`, `[out, in]`, in the factors' dtype.

    Args:
        A: `[r, in]`.
        B: `[out, r]`.
        mask: the bits of M, row-major, uint8 `[ceil(out * in / 8)]`.
        scale: s.
    """
    update = (B * scale) @ A
    return update.mul_(unpack_bits(mask, update.numel()).view(update.shape))


@torch.compiler.disable
def masked_product(x: Tensor, A: Tensor, B: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    r""":math:`X (s\,M \odot (B A))^\top` for `x` `[..., in]`, `[..., out]` in `dtype`.

    Kept for the backward pass: `x` in its own dtype, factors and bits. With :math:`G = M \odot dY^\top X` the gradients
    are :math:`dA = s B^\top G`, :math:`dB = s\,G A^\top`; dense matrices of the weight's shape live for one layer at a
    time.
    """
    return _MaskedProduct.apply(x, A, B, mask, scale, dtype)


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, mask: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, A, B, mask)
        ctx.scale, ctx.dtype = scale, dtype
        with autocast_off(x.device.type):
            return x.to(dtype) @ masked_update(A, B, mask, scale).to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, mask = ctx.saved_tensors
        dx = dA = dB = None
        with autocast_off(x.device.type):
            gradient = gradient.to(ctx.dtype)
            if ctx.needs_input_grad[0]:
                dx = (gradient @ masked_update(A, B, mask, ctx.scale).to(ctx.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                flat, dy = x.reshape(-1, x.shape[-1]).to(ctx.dtype), gradient.reshape(-1, gradient.shape[-1])
                G = (dy.t() @ flat).to(A.dtype)
                removed = unpack_bits(mask, G.numel()).logical_not_().view(G.shape)
                G.masked_fill_(removed, 0).mul_(
                    ctx.scale
                )  # not by a product: inf, of fp16 where nothing trains, is NaN then
                dA = B.t() @ G if ctx.needs_input_grad[1] else None
                dB = G @ A.t() if ctx.needs_input_grad[2] else None
        return dx, dA, dB, None, None, None
