r"""The one differentiable product of this package: :math:`Y = X (W + S)^\top + s\,((X A^\top) \odot g) B^\top + b`.

`W` is frozen, `S` lives on a support, `A`, `B`, `g` are the low-rank half; every part may be absent. Kept for the
backward pass: `x` once, in the compute dtype (only `x[:, cols]` where columns are all that needs it), and references to
parameters. The gradient exists at the support only; a dense one appears for a tile at a time, or for this one layer
when a `gradient_sink` asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from .sources import Source, Support
from .units import add_units_, column_gradient, read_units, unit_gradient

GradientSink = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Plan:
    """What is constant over one call: the shape, where the weight comes from, how units are cut, who sees gradients."""

    rows: int
    cols: int
    compute_dtype: torch.dtype
    source: Source | None = None
    """The frozen weight; None computes `X S^T` and the low-rank half alone, for layers that run `X W^T` themselves."""
    granularity: str = "entry"
    block_size: int = 0
    scale: float = 1.0
    """`s`, the scaling of the low-rank half."""
    gradient_sink: GradientSink | None = None
    """Called in the backward pass with this layer's dense gradient `[rows, cols]`, once per micro-batch."""


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
) -> torch.Tensor:
    r"""Apply :math:`Y = X (W + S)^\top + s\,((X A^\top) \odot g) B^\top + b`.

    Shapes: `x` `[..., cols]`; `values` see `ops.units`, `units` `[k]` sorted and distinct; `A` `[r, cols]`,
    `B` `[rows, r]`, `gate` `[r]`; `bias` `[rows]`. Returns `[..., rows]` in `plan.compute_dtype`.
    Dtypes: adapter tensors are masters (fp32 as a rule) and are cast to the compute dtype for the products; gradients
    come back in each tensor's own dtype.
    """
    return _SparseLinear.apply(x, values, units, A, B, gate, bias, plan)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, units, A, B, gate, bias, plan: Plan):
        ctx.plan, ctx.thread, ctx.x_shape, ctx.x_dtype = plan, threading.get_ident(), x.shape, x.dtype
        needs_x = any(ctx.needs_input_grad[index] for index in (1, 3, 4, 5)) or plan.gradient_sink is not None
        ctx.columns_only = plan.granularity == "column" and A is None and plan.gradient_sink is None
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(plan.compute_dtype)
            x2d = x.reshape(-1, plan.cols)
            y = _base_product(x2d, _support(plan, values, units), bias, plan, ctx.thread)
            if A is not None:
                hidden = _scaled(x2d @ A.to(x2d.dtype).t(), gate, plan.scale)
                y.addmm_(hidden, B.to(x2d.dtype).t())
            kept = x2d.index_select(1, units) if needs_x and ctx.columns_only else x
        ctx.save_for_backward(kept if needs_x else None, values, units, A, B, gate, bias)
        return y.view(*ctx.x_shape[:-1], plan.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, values, units, A, B, gate, bias = ctx.saved_tensors
        plan, needs = ctx.plan, ctx.needs_input_grad
        with torch.autocast(grad_output.device.type, enabled=False):
            dy = grad_output.reshape(-1, plan.rows).to(plan.compute_dtype)
            x2d = None if x is None else x.reshape(-1, x.shape[-1])
            grad_x = _input_gradient(dy, _support(plan, values, units), plan, ctx.thread) if needs[0] else None
            grad_values = _values_gradient(dy, x2d, values, units, plan, needs[1], ctx.columns_only)
            grad_A = grad_B = grad_gate = None
            if A is not None:
                grad_A, grad_B, grad_gate = _low_rank_gradients(dy, x2d, A, B, gate, plan.scale, grad_x, needs)
            grad_bias = dy.sum(0).to(bias.dtype) if bias is not None and needs[6] else None
            if grad_x is not None:
                grad_x = grad_x.to(ctx.x_dtype).view(ctx.x_shape)
        return grad_x, grad_values, None, grad_A, grad_B, grad_gate, grad_bias, None


def _support(plan: Plan, values: torch.Tensor | None, units: torch.Tensor | None) -> Support | None:
    return None if values is None else Support(units, values, plan.granularity, plan.block_size)


def _scaled(hidden: torch.Tensor, gate: torch.Tensor | None, scale: float) -> torch.Tensor:
    return hidden.mul_(scale) if gate is None else hidden.mul_((gate * scale).to(hidden.dtype))


def _base_product(x2d, support, bias, plan, thread) -> torch.Tensor:
    if plan.source is not None:
        with plan.source.standing(support, x2d.dtype, thread) as weight:
            return torch.nn.functional.linear(x2d, weight, None if bias is None else bias.to(x2d.dtype))
    if support is None:
        return x2d.new_zeros(x2d.shape[0], plan.rows)
    if support.granularity == "row":
        y = x2d.new_zeros(x2d.shape[0], plan.rows)
        return y.index_copy_(1, support.units.long(), x2d @ support.values.to(x2d.dtype).t())
    if support.granularity == "column":
        return x2d.index_select(1, support.units) @ support.values.to(x2d.dtype)
    return x2d @ _dense_support(support, plan, x2d).t()


def _input_gradient(dy, support, plan, thread) -> torch.Tensor:
    if plan.source is not None:
        with plan.source.standing(support, dy.dtype, thread) as weight:
            return dy @ weight
    if support is None:
        return dy.new_zeros(dy.shape[0], plan.cols)
    if support.granularity == "row":
        return dy.index_select(1, support.units) @ support.values.to(dy.dtype)
    if support.granularity == "column":
        grad_x = dy.new_zeros(dy.shape[0], plan.cols)
        return grad_x.index_copy_(1, support.units.long(), dy @ support.values.to(dy.dtype).t())
    return dy @ _dense_support(support, plan, dy)


def _dense_support(support: Support, plan: Plan, like: torch.Tensor) -> torch.Tensor:
    dense = like.new_zeros(plan.rows, plan.cols)
    add_units_(dense, support.units, support.values, support.granularity, support.block_size)
    return dense


def _values_gradient(dy, x2d, values, units, plan, needed, columns_only) -> torch.Tensor | None:
    if plan.gradient_sink is not None:
        dense = dy.t() @ x2d
        plan.gradient_sink(dense)
        return read_units(dense, units, plan.granularity, plan.block_size).to(values.dtype) if needed else None
    if not needed:
        return None
    if columns_only:
        return column_gradient(dy, x2d).to(values.dtype)
    return unit_gradient(dy, x2d, units, plan.granularity, plan.block_size).to(values.dtype)


def _low_rank_gradients(dy, x2d, A, B, gate, scale, grad_x, needs):
    """Gradients of `A`, `B`, `gate`; adds the low-rank half's share to `grad_x` in place."""
    grad_hidden = dy @ B.to(dy.dtype)  # [tokens, r], before the gate
    hidden = x2d @ A.to(x2d.dtype).t() if needs[4] or needs[5] else None
    grad_gate = None
    if gate is not None and needs[5]:
        grad_gate = ((hidden * grad_hidden).sum(0, dtype=gate.dtype) * scale).to(gate.dtype)
    grad_B = (dy.t() @ _scaled(hidden, gate, scale)).to(B.dtype) if needs[4] else None
    grad_hidden = _scaled(grad_hidden, gate, scale)
    grad_A = (grad_hidden.t() @ x2d).to(A.dtype) if needs[3] else None
    if grad_x is not None:
        grad_x.addmm_(grad_hidden, A.to(dy.dtype))
    return grad_A, grad_B, grad_gate
