r"""The one differentiable product of this package: :math:`Y = X (W + S)^\top + s\,((X A^\top) \odot g) B^\top + b`.

Kept for the backward pass: `x` once, in the compute dtype (only `x[:, cols]` where columns, a sub-grid or blocks in few
columns are all that needs it, nothing where autograd keeps two factors of it), and references to parameters. The
gradient exists at the support only; a dense one appears for a tile at a time, or for this one layer when a
`gradient_reader` asks for it.
"""

from __future__ import annotations

import weakref

import torch
from torch.autograd.function import once_differentiable

from .autocast import autocast_off
from .core import (
    Gradients,
    Operands,
    Plan,
    backward_product,
    forward_product,
    kept_columns,
)
from .recomputed import factors_of
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
    counts: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    live_columns: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Apply :math:`Y = X (W + S)^\top + s\,((X A^\top) \odot g) B^\top + b`.

    Shapes: `x` `[..., cols]`; `values` see `ops.units`, `units` `[k]` sorted and distinct (packed entries: places
    and `counts`; see `ops.pack_entries`); `live_rows` `[R]` and `live_columns` `[C]`, a sub-grid: a subnet has values
    `[R, C]` and no units, all entries of a support may be known to lie in one, and all blocks in the columns of blocks
    `live_columns`;
    `A` `[r, cols]`, `B` `[rows, r]`, `gate` `[r]`; `bias` `[rows]`.
    Returns `[..., rows]` in `plan.compute_dtype`.
    Dtypes: adapter tensors are masters (fp32 as a rule) and are cast to the compute dtype for the products; gradients
    come back in each tensor's own dtype.

    Where `S` goes: nothing is written into the frozen weight. Over 16-bit products all units but entries have
    a product of their own, which keeps the smallest values (the input gradient of blocks, on a diagonal too, may round
    them, see `ops.support_product`). Entries have one too while there are few tokens (on CPUs); for more, one forward
    or backward product at a time has a copy of the weight with `S` added, rounded to the compute dtype. Over a bf16
    weight `w` that copy hides an entry's change below about :math:`2^{-9} |w|` until it has grown beyond.

    Raises:
        RuntimeError: in the backward pass, where the frozen weight was written to or packed entries moved since the
            forward pass.
    """
    return _SparseLinear.apply(x, values, units, A, B, gate, bias, counts, live_rows, live_columns, plan)


_kept_whole: weakref.ref | None = None
"""The input that a product was last given and kept whole. A layer that shares it keeps no slice beside it."""
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


def _columns_to_keep(x: torch.Tensor, plan: Plan, operands: Operands, needs_x: bool) -> torch.Tensor | None:
    global _kept_whole
    columns = kept_columns(plan.granularity, plan.rows, x, operands, plan.shows_gradient, plan.column_width)
    if columns is None:
        _kept_whole = weakref.ref(x) if needs_x else _kept_whole
        return None
    return None if _kept_whole is not None and _kept_whole() is x else columns


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, units, A, B, gate, bias, counts, live_rows, live_columns, plan: Plan):
        operands = Operands(values, units, A, B, gate, bias, counts, live_rows, live_columns)
        ctx.plan, ctx.weight_version, ctx.x_shape, ctx.x_dtype = plan, version_of(plan.source), x.shape, x.dtype
        needs_x = any(ctx.needs_input_grad[index] for index in (1, 3, 4, 5)) or plan.shows_gradient
        ctx.units_version = None if plan.units_version is None else plan.units_version()
        with autocast_off(x.device.type):
            x = _shared_cast(x, plan.compute_dtype)
            ctx.factors = factors_of(x) if needs_x else None
            columns = _columns_to_keep(x, plan, operands, needs_x and ctx.factors is None)
            ctx.columns_only = columns is not None
            x2d = x.reshape(-1, plan.cols)
            # Entries are as a rule in a copy of the weight, and read no columns of the input in the forward pass;
            # blocks read a few at a time.
            read = columns is not None and (ctx.factors is None or plan.granularity in ("column", "subnet"))
            x_columns = take_columns(x2d, columns, plan.column_width) if read else None
            y = forward_product(x2d, plan, operands, x_columns)
        kept = None if ctx.factors is not None or not needs_x else x if columns is None else x_columns
        ctx.save_for_backward(kept, *operands)
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
        if ctx.units_version is not None and plan.units_version() != ctx.units_version:
            raise RuntimeError(
                "The support of a layer moved between its forward and its backward pass. Run backward() before moves."
            )
        with autocast_off(grad_output.device.type):
            dy = grad_output.reshape(-1, plan.rows).to(plan.compute_dtype)
            operands = Operands(*operands)
            if ctx.factors is not None:
                columns = operands.units if plan.granularity == "column" else operands.live_columns
                x = ctx.factors.product(columns if ctx.columns_only else None, plan.column_width)
            x2d = None if x is None else x.reshape(x.shape[:-1].numel(), x.shape[-1])
            grads = backward_product(dy, x2d, plan, operands, needs, ctx.columns_only)
            grad_x = None if grads.x is None else grads.x.to(ctx.x_dtype).view(ctx.x_shape)
        return grad_x, grads.values, None, grads.A, grads.B, grads.gate, grads.bias, None, None, None, None
