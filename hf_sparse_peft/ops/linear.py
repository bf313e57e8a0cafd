r"""The one differentiable product of this package: :math:`Y = X (W + S)^\top + s\,((X A^\top) \odot g) B^\top + b`.

Kept for the backward pass: `x` once, in the compute dtype (only `x[:, cols]` where columns or a subnet are all that
needs it), and references to parameters. The gradient exists at the support only; a dense one appears for a tile at a
time, or for this one layer when a `gradient_reader` asks for it.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.autograd.function import once_differentiable

from .core import (
    Gradients,
    Operands,
    Plan,
    backward_product,
    forward_product,
    kept_columns,
)
from .sources import check_version, version_of
from .subgrid import take_columns


def sparse_linear(
    x: torch.Tensor,
    plan: Plan,
    *,
    values: torch.Tensor | None = None,
    units: torch.Tensor | None = None,
    A: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_ends: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    live_columns: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Apply :math:`Y = X (W + S)^\top + s\,((X A^\top) \odot g) B^\top + b`.

    Shapes: `x` `[..., cols]`; `values` see `ops.units`, `units` `[k]` sorted and distinct (packed entries: their
    columns, with `row_ends`; see `ops.pack_entries`; a subnet has none, but `live_rows` `[R]`, `live_columns` `[C]` and
    values `[R, C]`); `A` `[r, cols]`, `B` `[rows, r]`, `gate` `[r]`; `bias` `[rows]`.
    Returns `[..., rows]` in `plan.compute_dtype`.
    Dtypes: adapter tensors are masters (fp32 as a rule) and are cast to the compute dtype for the products; gradients
    come back in each tensor's own dtype.

    Where `S` goes: nothing is written into the frozen weight. Over 16-bit products all units but entries have
    a product of their own, which keeps the smallest values (the input gradient of blocks may round them, see
    `ops.support_product`). Entries have one too while there are few tokens (on CPUs); for more, one forward or backward
    product at a time has a copy of the weight with `S` added, rounded to the compute dtype. Over a bf16 weight `w` that
    copy hides an entry's change below about :math:`2^{-9} |w|` until it has grown beyond.

    Raises:
        RuntimeError: in the backward pass, where the frozen weight was written to since the forward pass.
    """
    return _SparseLinear.apply(x, values, units, A, B, gate, bias, row_ends, live_rows, live_columns, plan)


def _without_autocast(device_type: str) -> AbstractContextManager:
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


_last_cast: tuple[weakref.ref, int, weakref.ref] | None = None


def _shared_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype`; layers that are fed the same `x` one after the other (q, k, v; gate, up) keep one copy of it.

    Only weak references are held: the copy lives as long as the graphs that saved it.
    """
    global _last_cast
    if x.dtype == dtype or x.is_inference():
        return x.to(dtype)
    last = _last_cast
    if last is not None and last[0]() is x and last[1] == x._version:
        cast = last[2]()
        if cast is not None and cast.dtype == dtype:
            return cast
    cast = x.to(dtype)
    _last_cast = (weakref.ref(x), x._version, weakref.ref(cast))
    return cast


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, units, A, B, gate, bias, row_ends, live_rows, live_columns, plan: Plan):
        operands = Operands(values, units, A, B, gate, bias, row_ends, live_rows, live_columns)
        ctx.plan, ctx.weight_version, ctx.x_shape, ctx.x_dtype = plan, version_of(plan.source), x.shape, x.dtype
        needs_x = any(ctx.needs_input_grad[index] for index in (1, 3, 4, 5)) or plan.shows_gradient
        columns = kept_columns(plan.granularity, operands, plan.shows_gradient)
        ctx.columns_only = columns is not None
        with _without_autocast(x.device.type):
            x = _shared_cast(x, plan.compute_dtype)
            x2d = x.reshape(-1, plan.cols)
            kept = x if columns is None else take_columns(x2d, columns)
            y = forward_product(x2d, plan, operands, None if columns is None else kept)
        ctx.save_for_backward(kept if needs_x else None, *operands)
        return y.view(*ctx.x_shape[:-1], plan.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, *operands = ctx.saved_tensors
        plan = ctx.plan
        wanted = ctx.needs_input_grad
        needs = Gradients(wanted[0], wanted[1], wanted[3], wanted[4], wanted[5], wanted[6])
        if needs.x:
            check_version(plan.source, ctx.weight_version)
        with _without_autocast(grad_output.device.type):
            dy = grad_output.reshape(-1, plan.rows).to(plan.compute_dtype)
            x2d = None if x is None else x.reshape(x.shape[:-1].numel(), x.shape[-1])
            grads = backward_product(dy, x2d, plan, Operands(*operands), needs, ctx.columns_only)
            grad_x = None if grads.x is None else grads.x.to(ctx.x_dtype).view(ctx.x_shape)
        return grad_x, grads.values, None, grads.A, grads.B, grads.gate, grads.bias, None, None, None, None
