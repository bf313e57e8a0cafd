"""Products with a frozen matrix that is held in a wider dtype than they run in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast_off


def frozen_product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    r""":math:`X W^\top` in `dtype`, `[..., rows]`, for `x` `[..., cols]` and `weight` `[rows, cols]` without gradient.

    Kept for the backward pass: the weight itself, which is cast again there; autograd would keep the cast copy of every
    layer.
    """
    if weight.dtype == dtype or weight.requires_grad:
        return x.to(dtype) @ weight.to(dtype).t()
    return _FrozenProduct.apply(x, weight, dtype)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtypes = dtype, x.dtype
        with autocast_off(x.device.type):
            return x.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        dtype, of_x = ctx.dtypes
        with autocast_off(gradient.device.type):
            return (gradient.to(dtype) @ weight.to(dtype)).to(of_x), None, None
