"""The product with a weight that is held as singular values and vectors, some of which train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast_off


def spectral_product(x: Tensor, left: Tensor, right: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    r""":math:`X\,V\,\mathrm{diag}(\sigma)\,U^\top` for `x` `[..., in]`, `left` U `[out, k]`, `right` V `[in, k]` and
    `values` `[k]`, in `dtype`, with SST's enhanced gradient of the vectors (Zhao et al., 2024):

    .. math:: \tilde\nabla U_i = (\nabla_W) V_i, \quad \tilde\nabla V_i = (\nabla_W)^\top U_i, \quad
        \nabla \sigma_i = U_i^\top (\nabla_W) V_i

    that is, without the factor :math:`\sigma_i` that would stall vectors of small values. The input's gradient is the
    true one. Kept for the backward pass: `x` in its own dtype, and the factors.
    """
    return _SpectralProduct.apply(x, left, right, values, dtype)


class _SpectralProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, left, right, values)
        ctx.dtype = dtype
        with autocast_off(x.device.type):
            inner = x.to(dtype) @ right.to(dtype)
            return (inner * values.to(dtype)) @ left.to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, values = ctx.saved_tensors
        dtype = ctx.dtype
        needs_x, needs_left, needs_right, needs_values, _ = ctx.needs_input_grad
        dx = dleft = dright = dvalues = None
        with autocast_off(x.device.type):
            dy = gradient.to(dtype).reshape(-1, gradient.shape[-1])
            outer = dy @ left.to(dtype)
            if needs_x:
                dx = ((outer * values.to(dtype)) @ right.to(dtype).t()).view(x.shape).to(x.dtype)
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            if needs_left or needs_values:
                inner = flat @ right.to(dtype)
                dleft = (dy.t() @ inner).to(left.dtype) if needs_left else None
                dvalues = (outer * inner).sum(0, dtype=values.dtype) if needs_values else None
            if needs_right:
                dright = (flat.t() @ outer).to(right.dtype)
        return dx, dleft, dright, dvalues, None
