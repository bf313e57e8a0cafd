"""The product with a factor that is held in a wider dtype than it runs in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops import autocast_off


def factor_product(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    r""":math:`X F^\top` in `dtype`, `[..., rows]`, for `x` `[..., cols]` and a factor `[rows, cols]`, both with
    gradients.

    Kept for the backward pass: `x` in its own dtype and the factor itself, which is cast again there; autograd would
    keep a cast copy of every layer's factors.
    """
    if factor.dtype == dtype:
        return x.to(dtype) @ factor.t()
    return _FactorProduct.apply(x, factor, dtype)


class _FactorProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.dtype = dtype
        with autocast_off(x.device.type):
            return x.to(dtype) @ factor.to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        dx = dF = None
        with autocast_off(x.device.type):
            gradient = gradient.to(ctx.dtype)
            if ctx.needs_input_grad[0]:
                dx = (gradient @ factor.to(ctx.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                flat = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                dF = (gradient.reshape(-1, gradient.shape[-1]).t() @ flat).to(factor.dtype)
        return dx, dF, None
