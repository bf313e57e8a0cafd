r"""Products with a support alone, beside the base's: :math:`Y \mathrel{+}= X S^\top`, :math:`dX \mathrel{+}= dY\, S`.

`S` is never added to the frozen weight here: what it adds is summed on its own and reaches the output whole, also where
it is smaller than the spacing of bf16 numbers at the weight.
"""

from __future__ import annotations

import warnings

import torch

from . import triton_kernels
from .costs import costs_of, entry_product_way, product_pays
from .diagonal import add_diagonal_product_, diagonal_shape
from .sources import Support
from .subgrid import add_to_columns_, take_columns
from .units import block_position, blocks_at_once


def runs_beside(
    support: Support,
    tokens: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    copied: bool = True,
) -> bool:
    r"""Whether :math:`X S^\top` (`gradient`: :math:`dY\, S`) runs beside the base's product; otherwise `S` goes into a
    copy of the weight.

    A 16-bit output never takes rows, columns and blocks from a copy: small values would be rounded away. fp32 and fp64
    take what is cheaper, and so does the input gradient with blocks and diagonals, which are the dearest: what it loses
    to a rounded copy is below its own rounding. Subnets always run beside. Entries take what is cheapest
    (`ops.costs`): on a CPU a product of their own for few tokens and a copy for many. `copied`: whether that copy is
    still to be made.
    """
    count = support.values.numel()
    costs = costs_of(support.values.device.type, dtype)
    if support.granularity == "entry":
        size = tokens, rows, cols, count, support.units.subgrid
        return entry_product_way(costs, *size, gradient=gradient, copied=copied) != "copy"
    exact = dtype in (torch.bfloat16, torch.float16) and not (gradient and support.granularity in ("block", "diagonal"))
    if support.granularity in ("column", "subnet") or exact:
        return True
    return product_pays(costs, tokens, rows, cols, count)


def beside_form(support: Support, tokens: int, rows: int, cols: int, dtype: torch.dtype, gradient: bool) -> Support:
    """`support` as it runs beside the base's product: entries as the subnet that they lie in, where that is cheaper."""
    if support.granularity != "entry" or support.units.subgrid is None:
        return support
    costs, size = costs_of(support.values.device.type, dtype), (tokens, rows, cols, support.values.numel())
    compacted = entry_product_way(costs, *size, support.units.subgrid, gradient=gradient, may_copy=False) == "compacted"
    return support.compacted(dtype) if compacted else support


def add_support_product_(
    y: torch.Tensor, x: torch.Tensor, support: Support, x_columns: torch.Tensor | None = None
) -> None:
    r""":math:`Y \mathrel{+}= X S^\top`: `y` `[tokens, rows]`, `x` `[tokens, cols]`, of one dtype. `x_columns` is `x` at
    the columns of a support of columns or of a subnet, where the caller has them already."""
    values = support.values if support.granularity == "entry" else support.values.to(x.dtype)
    if support.granularity == "row":
        add_to_columns_(y, support.units, x, values.t())
    elif support.granularity == "column":
        y.addmm_(take_columns(x, support.units) if x_columns is None else x_columns, values)
    elif support.granularity == "subnet":
        x_columns = take_columns(x, support.live_columns) if x_columns is None else x_columns
        add_to_columns_(y, support.live_rows, x_columns, values.t())
    elif support.granularity == "diagonal":
        number = diagonal_shape(y.shape[1], x.shape[1], support.block_size)[0]
        add_diagonal_product_(y, x, support.units, values.transpose(1, 2), number)
    elif support.granularity == "block":
        row, col = block_position(support.units, x.shape[1] // support.block_size)
        _add_blocks_(y, x, row, col, values.transpose(1, 2))
    else:
        y.add_((_sparse_matrix(support, y.shape[1], x.shape[1], x.dtype) @ _wide(x).t()).t())


def add_transposed_support_product_(
    dx: torch.Tensor, dy: torch.Tensor, support: Support, dy_rows: torch.Tensor | None = None
) -> None:
    r""":math:`dX \mathrel{+}= dY\, S`: `dx` `[tokens, cols]`, `dy` `[tokens, rows]`, of one dtype. `dy_rows` is `dy` at
    the rows of a subnet, where the caller has them already."""
    values = support.values if support.granularity == "entry" else support.values.to(dy.dtype)
    if support.granularity == "row":
        dx.addmm_(take_columns(dy, support.units), values)
    elif support.granularity == "column":
        add_to_columns_(dx, support.units, dy, values.t())
    elif support.granularity == "subnet":
        dy_rows = take_columns(dy, support.live_rows) if dy_rows is None else dy_rows
        add_to_columns_(dx, support.live_columns, dy_rows, values)
    elif support.granularity == "diagonal":
        number = diagonal_shape(dy.shape[1], dx.shape[1], support.block_size)[0]
        add_diagonal_product_(dx, dy, support.units, values, number)
    elif support.granularity == "block":
        row, col = block_position(support.units, dx.shape[1] // support.block_size)
        _add_blocks_(dx, dy, col, row, values)
    else:
        dx.add_((_sparse_matrix(support, dy.shape[1], dx.shape[1], dy.dtype).t() @ _wide(dy).t()).t())


def _add_blocks_(y: torch.Tensor, x: torch.Tensor, to: torch.Tensor, of: torch.Tensor, blocks: torch.Tensor) -> None:
    """`y[:, to] += x[:, of] @ blocks` over `k` blocks `[k, b, b]`; `to` and `of` count columns in steps of `b`."""
    tokens, size = x.shape[0], blocks.shape[1]
    if triton_kernels.serves_blocks(x, size):
        triton_kernels.add_blocks_(y, x, to, of, blocks)
        return
    y_blocks = y.view(tokens, -1, size)
    if y.device.type == "cpu":
        live, owner = torch.unique(to, return_inverse=True)
    else:  # the host would wait for a GPU to count the living ones
        live, owner = torch.arange(y_blocks.shape[1], device=y.device), to
    # Each addition to a 16-bit output rounds it. A few do no harm; many are summed beforehand.
    total = None
    if y.element_size() < 4 and to.numel() > 2 * live.numel():
        total = y.new_zeros(live.numel(), tokens, size, dtype=torch.float32)
    x_blocks, step = x.view(tokens, -1, size).transpose(0, 1), blocks_at_once(x, size)
    for start in range(0, to.numel(), step):
        some = slice(start, start + step)
        parts = torch.bmm(x_blocks.index_select(0, of[some]), blocks[some])
        if total is None:
            y_blocks.index_add_(1, to[some], parts.transpose(0, 1))  # ten times as fast as along a transposed 0
        else:
            total.index_add_(0, owner[some], parts.float())
    if total is not None:
        y_blocks.index_add_(1, live, total.to(y.dtype).transpose(0, 1))


def _sparse_matrix(support: Support, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    values = support.values.to(torch.promote_types(dtype, torch.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*support.units.compressed_rows, values, (rows, cols), check_invariants=False)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
