r"""The products behind `sparse_linear` and their gradients, without autograd.

:math:`Y = X (W + S)^\top + s\,((X A^\top) \odot g) B^\top + b`:
`W` is frozen, `S` is nonzero on a support, `A`, `B`, `g` are the low-rank half; every part may be absent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from .costs import costs_of, entry_gradient_way
from .entries import EntryIndex
from .sources import DenseSource, Source, Support
from .subgrid import subgrid_gradient, take_columns
from .support_product import add_support_product_, add_transposed_support_product_, beside_form, runs_beside
from .units import column_gradient, compacted_gradient, narrowed_blocks, unit_gradient
from .unread import are_read


class GradientReader(Protocol):
    """Reads gradients that the support alone would not show. A plain function of a dense gradient is one too.

    What it is shown is lent for the call: a reader that keeps or changes it makes a copy. It wants units of the plan's
    granularity; over a subnet, entries of the whole weight.
    """

    def wanted_units(self) -> torch.Tensor | None:
        """Sorted units whose gradients are enough this time; None asks for all of it (optional)."""

    def take(self, gradient: torch.Tensor) -> None:
        """Take the gradient of the wanted units (optional, with `wanted_units`)."""

    def __call__(self, gradient: torch.Tensor) -> None:
        """Take the dense gradient `[rows, cols]`."""


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
    gradient_reader: GradientReader | None = None
    """Called in the backward pass, once for every product of the forward pass."""
    passive_reader: Callable[[torch.Tensor], None] | None = None
    """Shown the dense gradient `[rows, cols]` too, from a product of its own: what is watched rounds no differently."""
    units_version: Callable[[], Hashable] | None = None
    """Answers otherwise once packed entries, which lie in a buffer of the layer, have moved."""

    @property
    def column_width(self) -> int:
        """Columns of the weight that are kept or left together."""
        return self.block_size if self.granularity == "block" else 1

    @property
    def shows_gradient(self) -> bool:
        """Whether somebody wants to see the dense gradient."""
        return self.gradient_reader is not None or self.passive_reader is not None


class Operands(NamedTuple):
    """Tensors of one product; see `ops.sparse_linear` for shapes."""

    values: torch.Tensor | None = None
    units: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    """With entries: `units` are places, and these count them (`ops.pack_entries`)."""
    live_rows: torch.Tensor | None = None
    """Rows of a sub-grid `[R]`, sorted and distinct. A subnet is all of it: it has no `units`, and values `[R, C]`
    (`ops.subgrid`). All of a support of entries may be known to lie in one."""
    live_columns: torch.Tensor | None = None
    """Columns of the sub-grid, `[C]`. Of blocks the columns of blocks that have one, where they are known."""


class Gradients(NamedTuple):
    """Gradients of one product, None where none was asked for; `x`'s is `[tokens, cols]` in the compute dtype."""

    x: torch.Tensor | None = None
    values: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    bias: torch.Tensor | None = None


# Up to which share of its columns an input is kept in part: three layers that share it would keep more than all of it.
_MOST_KEPT = 1 / 3


def kept_columns(
    granularity: str, rows: int, x: torch.Tensor, operands: Operands, shows_gradient: bool, width: int = 1
) -> torch.Tensor | None:
    """The columns of `x` `[..., cols]` that the backward pass needs, in steps of `width` (`Plan.column_width`); None
    where it needs all of them."""
    if operands.values is None or operands.A is not None or shows_gradient:
        return None
    columns = operands.units if granularity == "column" else operands.live_columns
    if columns is None or width * columns.shape[0] > _MOST_KEPT * x.shape[-1]:
        return None
    if granularity == "entry":
        costs, subgrid = costs_of(x.device.type, x.dtype), (operands.live_rows.shape[0], columns.shape[0])
        if entry_gradient_way(costs, rows, x.shape[-1], operands.units.shape[0], subgrid) != "compacted":
            return None
    return columns


def forward_product(
    x2d: torch.Tensor, plan: Plan, operands: Operands, x_columns: torch.Tensor | None = None
) -> torch.Tensor:
    """`[tokens, rows]` from `[tokens, cols]`, both in the compute dtype; `x_columns` are those of `kept_columns`."""
    y = _base_product(x2d, support_of(plan, operands), operands.bias, plan, x_columns)
    if operands.A is not None:
        hidden = x2d @ operands.A.to(x2d.dtype).t()
        y.addmm_(_scaled(hidden, operands.gate, plan.scale), operands.B.to(x2d.dtype).t())
    return y


def backward_product(
    dy: torch.Tensor,
    x2d: torch.Tensor | None,
    plan: Plan,
    operands: Operands,
    needs: Gradients,
    columns_only: bool,
) -> Gradients:
    """Gradients for `dy` `[tokens, rows]`; `x2d` `[tokens, cols]`, or its columns by `kept_columns` (`columns_only`).

    `needs` has True where a gradient is asked for.
    """
    A, B, gate, bias = operands.A, operands.B, operands.gate, operands.bias
    support = support_of(plan, operands)
    # Entries that keep columns only have a compacted gradient.
    cut = support is not None and (plan.granularity == "subnet" or (columns_only and plan.granularity == "entry"))
    dy_rows = take_columns(dy, support.live_rows) if cut else None
    grad_x = _input_gradient(dy, support, plan, dy_rows) if needs.x else None
    grad_values = _values_gradient(dy, x2d, support, plan, needs.values, columns_only, dy_rows)
    grad_A = grad_B = grad_gate = None
    if A is not None:
        grad_A, grad_B, grad_gate = _low_rank_gradients(dy, x2d, A, B, gate, plan.scale, grad_x, needs)
    grad_bias = dy.sum(0).to(bias.dtype) if bias is not None and needs.bias else None
    return Gradients(grad_x, grad_values, grad_A, grad_B, grad_gate, grad_bias)


def support_of(plan: Plan, operands: Operands) -> Support | None:
    """The sparse half of `operands`, unpacked as far as a product asks for it."""
    values, units, subgrid = operands.values, operands.units, (operands.live_rows, operands.live_columns)
    if values is None:
        return None
    if plan.granularity == "entry":
        units = EntryIndex(units, operands.counts, plan.rows, plan.cols, *subgrid)
        return Support(units, values, "entry", 0, units.live_rows, units.live_columns)
    return Support(units, values, plan.granularity, plan.block_size, *subgrid)


def _scaled(hidden: torch.Tensor, gate: torch.Tensor | None, scale: float) -> torch.Tensor:
    return hidden.mul_(scale) if gate is None else hidden.mul_((gate * scale).to(hidden.dtype))


def _base_product(
    x2d: torch.Tensor, support: Support | None, bias: torch.Tensor | None, plan: Plan, x_columns: torch.Tensor | None
) -> torch.Tensor:
    weight, beside = _weight(plan, support, x2d)
    if weight is None:
        y = x2d.new_zeros(x2d.shape[0], plan.rows)
    else:
        y = torch.nn.functional.linear(x2d, weight, None if bias is None else bias.to(x2d.dtype))
    if beside is not None:
        add_support_product_(y, x2d, beside, x_columns)
    return y


def _input_gradient(
    dy: torch.Tensor, support: Support | None, plan: Plan, dy_rows: torch.Tensor | None
) -> torch.Tensor:
    weight, beside = _weight(plan, support, dy, gradient=True)
    grad_x = dy.new_zeros(dy.shape[0], plan.cols) if weight is None else dy @ weight
    if beside is not None:
        add_transposed_support_product_(grad_x, dy, beside, dy_rows)
    return grad_x


def _weight(
    plan: Plan, support: Support | None, like: torch.Tensor, gradient: bool = False
) -> tuple[torch.Tensor | None, Support | None]:
    """The `[rows, cols]` weight of the base's product, to be read only, and the support that runs beside it.

    The support is in the weight, which is a copy then, where `runs_beside` says so.
    """
    shape = like.shape[0], plan.rows, plan.cols, like.dtype
    copied = isinstance(plan.source, DenseSource)
    if support is not None and not runs_beside(support, *shape, gradient=gradient, copied=copied):
        if plan.source is not None:
            return plan.source.with_support(support, like.dtype), None
        if support.granularity == "entry":
            return support.written_into(like.new_zeros(plan.rows, plan.cols), support.values), None
    beside = None if support is None else beside_form(support, *shape, gradient)
    return None if plan.source is None else plan.source.read(like.dtype), beside


def _values_gradient(dy, x2d, support, plan, needed, columns_only, dy_rows) -> torch.Tensor | None:
    reader = plan.gradient_reader if are_read() else None
    if plan.passive_reader is not None and are_read():
        plan.passive_reader(dy.t() @ x2d)
    if reader is not None:
        wanted = reader.wanted_units() if hasattr(reader, "wanted_units") else None
        if wanted is None:
            dense = dy.t() @ x2d
            # First: what training uses does not depend on what a reader does.
            own = support.read(dense).to(support.values.dtype) if needed else None
            reader(dense)
            return own
        cut = ("entry", 0) if plan.granularity == "subnet" else (plan.granularity, plan.block_size)
        reader.take(unit_gradient(dy, x2d, wanted, *cut))
    if not needed:
        return None
    if plan.granularity == "subnet":
        gradient = subgrid_gradient(dy_rows, x2d if columns_only else take_columns(x2d, support.live_columns))
    elif columns_only and plan.granularity == "entry":
        gradient = compacted_gradient(dy_rows, x2d, support.units)
    elif columns_only and plan.granularity == "column":
        gradient = column_gradient(dy, x2d)
    elif columns_only:
        per_row = plan.cols // plan.block_size
        units = narrowed_blocks(support.units, support.live_columns, per_row)
        gradient = unit_gradient(dy, x2d, units, "block", plan.block_size)
    else:
        gradient = unit_gradient(dy, x2d, support.units, plan.granularity, plan.block_size)
    return gradient.to(support.values.dtype)


def _low_rank_gradients(dy, x2d, A, B, gate, scale, grad_x, needs):
    """Gradients of `A`, `B`, `gate`; adds the low-rank half's part to `grad_x` in place."""
    grad_hidden = dy @ B.to(dy.dtype)  # [tokens, r], before the gate
    hidden = x2d @ A.to(x2d.dtype).t() if needs.B or needs.gate else None
    grad_gate = None
    if gate is not None and needs.gate:
        grad_gate = ((hidden * grad_hidden).sum(0, dtype=gate.dtype) * scale).to(gate.dtype)
    grad_B = (dy.t() @ _scaled(hidden, gate, scale)).to(B.dtype) if needs.B else None
    grad_hidden = _scaled(grad_hidden, gate, scale)
    grad_A = (grad_hidden.t() @ x2d).to(A.dtype) if needs.A else None
    if grad_x is not None:
        grad_x.addmm_(grad_hidden, A.to(dy.dtype))
    return grad_A, grad_B, grad_gate
