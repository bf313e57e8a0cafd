"""The product of activations with a kernel update that exists one tile at a time, forwards and backwards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops import autocast_off
from .kernels import (
    Competition,
    KernelPlan,
    find_threshold,
    kernel_tile,
    masters,
    tile_rows,
    tiles_of,
)


@torch.compiler.disable
def kernel_product(x: Tensor, P: Tensor, Q: Tensor, mix: Tensor | None, plan: KernelPlan) -> Tensor:
    r""":math:`X\,\Delta W^\top` for `x` `[..., in]`, `[..., out]` in `plan.dtype`.

    Kept for the backward pass: `x` in its own dtype and the factors, which are parameters; the update is built again
    there, tile by tile. Products run in `plan.dtype`, sums over tiles in fp32 or more.

    Raises:
        ValueError: the kernel has a NaN; names the module.
    """
    return _KernelProduct.apply(x, P, Q, mix, plan)


class _KernelProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, P: Tensor, Q: Tensor, mix: Tensor | None, plan: KernelPlan) -> Tensor:
        with autocast_off(x.device.type):
            points = masters(P, Q, mix)
            tiles = tiles_of(*points, plan)
            threshold = find_threshold(tiles, plan, P.shape[1] * Q.shape[1])
            ctx.save_for_backward(x, P, Q, mix)
            ctx.plan, ctx.threshold = plan, threshold
            flat, compete, result = x.reshape(-1, x.shape[-1]), Competition(plan.mode, threshold), None
            for rows, w in tiles():
                part = flat[:, rows].to(plan.dtype) @ compete(w)[0].to(plan.dtype)
                wide = torch.promote_types(part.dtype, torch.float32)
                result = part if result is None else result.to(wide).add_(part)
            return result.to(plan.dtype).reshape(*x.shape[:-1], Q.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, P, Q, mix = ctx.saved_tensors
        with autocast_off(x.device.type):
            return _gradients(x, P, Q, mix, ctx.plan, ctx.threshold, grad, ctx.needs_input_grad)


def _gradients(
    x: Tensor,
    P: Tensor,
    Q: Tensor,
    mix: Tensor | None,
    plan: KernelPlan,
    threshold: tuple[float, int] | None,
    grad: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    of_factors = any(needed[1:4])
    points = masters(P, Q, mix)
    flat, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]).to(plan.dtype)
    dx = torch.empty(flat.shape, dtype=plan.dtype, device=x.device) if needed[0] else None
    sums = [None if t is None else torch.zeros_like(t) for t in points]
    compete = Competition(plan.mode, threshold)
    for rows in tile_rows(P.shape[1], Q.shape[1], plan.tile_entries):
        leaves = [points[0][:, rows], *points[1:]]
        with torch.set_grad_enabled(of_factors):
            leaves = [None if t is None else t.detach().requires_grad_(of_factors) for t in leaves]
            w = kernel_tile(*leaves, plan.scale)
        update, factor = compete(w.detach())
        if dx is not None:
            dx[:, rows] = dy @ update.t().to(plan.dtype)
        if not of_factors:
            continue
        dw = (flat[:, rows].t().to(plan.dtype) @ dy).to(w.dtype)
        dw = dw if factor is None else dw.mul_(factor)
        parts = torch.autograd.grad(w, [t for t in leaves if t is not None], dw)
        sums[0][:, rows] = parts[0]
        for total, part in zip(sums[1:], parts[1:], strict=False):
            total += part
    found = [None if dx is None else dx.reshape(x.shape).to(x.dtype)]
    for factor, total, wanted in zip((P, Q, mix), sums, needed[1:4], strict=True):
        found.append(total.to(factor.dtype) if wanted else None)
    return (*found, None)
