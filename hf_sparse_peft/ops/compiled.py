"""`sparse_linear` as one opaque node for `torch.compile`, with the same products behind it as the eager path.

What no graph can carry (how to dequantise a weight, who reads dense gradients) is looked up when the node runs,
under an integer that the layer registers: adding and removing readers, or moving a support, changes no graph.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch

from .core import Gradients, Operands, Plan, backward_product, forward_product, kept_columns
from .sources import DenseSource, Source
from .subgrid import take_columns


class Runtime(Protocol):
    """What a registered owner answers when its node runs."""

    def runtime_source(self) -> Source | None:
        """Where the weight comes from, for weights that are not passed as a tensor."""

    def runtime_reader(self) -> Any:
        """Who reads this layer's dense gradient, or None."""


_owners: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def register_owner(owner: Runtime) -> int:
    """A number under which compiled nodes find `owner`, for as long as it lives."""
    number = next(_numbers)
    _owners[number] = owner
    return number


def _plan(
    owner: int,
    weight: torch.Tensor | None,
    transposed: bool,
    dequantized: bool,
    rows: int,
    cols: int,
    granularity: str,
    block_size: int,
    scale: float,
    dtype: torch.dtype,
    read: bool,
) -> Plan:
    runtime = _owners[owner]
    source: Source | None = None
    if weight is not None:
        source = DenseSource(weight, transposed)
    elif dequantized:
        source = runtime.runtime_source()
    return Plan(rows, cols, dtype, source, granularity, block_size, scale, runtime.runtime_reader() if read else None)


@torch.library.custom_op("hf_sparse_peft::sparse_linear", mutates_args=())
def _forward_node(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    values: torch.Tensor | None,
    units: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    gate: torch.Tensor | None,
    bias: torch.Tensor | None,
    counts: torch.Tensor | None,
    live_rows: torch.Tensor | None,
    live_columns: torch.Tensor | None,
    owner: int,
    transposed: bool,
    dequantized: bool,
    rows: int,
    granularity: str,
    block_size: int,
    scale: float,
    may_read: bool,
    read: bool,
) -> torch.Tensor:
    plan = _plan(
        owner, weight, transposed, dequantized, rows, x.shape[-1], granularity, block_size, scale, x.dtype, read
    )
    operands = Operands(values, units, A, B, gate, bias, counts, live_rows, live_columns)
    y = forward_product(x.reshape(-1, x.shape[-1]), plan, operands)
    return y.view(*x.shape[:-1], rows)


@_forward_node.register_fake
def _(x, *inputs):
    rows = inputs[13]
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("hf_sparse_peft::sparse_linear_backward", mutates_args=())
def _backward_node(
    grad_output: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    values: torch.Tensor | None,
    units: torch.Tensor | None,
    A: torch.Tensor | None,
    B: torch.Tensor | None,
    gate: torch.Tensor | None,
    bias: torch.Tensor | None,
    counts: torch.Tensor | None,
    live_rows: torch.Tensor | None,
    live_columns: torch.Tensor | None,
    owner: int,
    transposed: bool,
    dequantized: bool,
    cols: int,
    granularity: str,
    block_size: int,
    scale: float,
    read: bool,
    columns_only: bool,
    needs: list[bool],
) -> list[torch.Tensor]:
    rows = grad_output.shape[-1]
    plan = _plan(
        owner, weight, transposed, dequantized, rows, cols, granularity, block_size, scale, grad_output.dtype, read
    )
    dy = grad_output.reshape(-1, rows)
    x2d = None if x is None else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    operands = Operands(values, units, A, B, gate, bias, counts, live_rows, live_columns)
    grads = backward_product(dy, x2d, plan, operands, Gradients(*needs), columns_only)
    if grads.x is not None:
        grads = grads._replace(x=grads.x.view(*grad_output.shape[:-1], cols))
    # A node answers with tensors only: empty ones stand for gradients that nobody asked for.
    return [grad_output.new_empty(0) if g is None else g for g in grads]


@_backward_node.register_fake
def _(grad_output, x, weight, values, units, A, B, gate, bias, *rest):
    cols, needs = rest[6], rest[-1]
    shaped = (None, values, A, B, gate, bias)
    empty = grad_output.new_empty(0)
    grads = [torch.empty_like(like) if like is not None and n else empty for like, n in zip(shaped, needs, strict=True)]
    grads[0] = grad_output.new_empty(*grad_output.shape[:-1], cols) if needs[0] else empty
    return grads


def _setup_context(ctx, inputs, output) -> None:
    x, weight, *tensors = inputs[:11]
    owner, transposed, dequantized, rows, granularity, block_size, scale, may_read, read = inputs[11:]
    operands = Operands(*tensors)
    # Whether a gradient is read at a given step is not known when the graph is made; `may_read` says whether ever.
    width = block_size if granularity == "block" else 1
    columns = kept_columns(granularity, rows, x, operands, may_read, width)
    ctx.columns_only = columns is not None
    kept = x if columns is None else take_columns(x.reshape(-1, x.shape[-1]), columns, width)
    ctx.save_for_backward(kept, weight, *operands)
    ctx.options = (owner, transposed, dequantized, x.shape[-1], granularity, block_size, scale, read, ctx.columns_only)


def _backward(ctx, grad_output):
    x, weight, *operands = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[2], wanted[4], wanted[5], wanted[6], wanted[7]]
    grads = _backward_node(grad_output.contiguous(), x, weight, *operands, *ctx.options, needs)
    x_grad, values, A, B, gate, bias = (g if n else None for g, n in zip(grads, needs, strict=True))
    return x_grad, None, values, None, A, B, gate, bias, *[None] * 12


_forward_node.register_autograd(_backward, setup_context=_setup_context)


def sparse_linear_node(
    x: torch.Tensor,
    owner: int,
    rows: int,
    *,
    weight: torch.Tensor | None = None,
    transposed: bool = False,
    dequantized: bool = False,
    values: torch.Tensor | None = None,
    units: torch.Tensor | None = None,
    A: torch.Tensor | None = None,
    B: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    live_rows: torch.Tensor | None = None,
    live_columns: torch.Tensor | None = None,
    granularity: str = "entry",
    block_size: int = 0,
    scale: float = 1.0,
    may_read: bool = False,
    read: bool = True,
) -> torch.Tensor:
    """`sparse_linear` for use inside `torch.compile`, on an `x` that is already in the compute dtype.

    The weight is `weight` (its transpose with `transposed`), or what the owner's `runtime_source` gives
    (`dequantized`), or nothing. `may_read` says whether dense gradients may ever be asked for, `read` whether
    the layer's reader is shown this product's: a layer of two products shows one.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _forward_node(
            x, weight, values, units, A, B, gate, bias, counts, live_rows, live_columns,
            owner, transposed, dequantized, rows, granularity, block_size, scale, may_read, read,
        )  # fmt: skip
