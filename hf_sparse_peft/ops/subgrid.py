r"""A sub-grid of a weight: the crossings of some rows `R` and some columns `C`, as one dense matrix `V` `[R, C]`.

    rows (0, 2), columns (1, 3)      [. v . v]
                                     [. . . .]      V = [[v, v],
                                     [. v . v]           [v, v]]

:math:`Y_{:, R} \mathrel{+}= X_{:, C} V^\top`, :math:`dX_{:, C} \mathrel{+}= dY_{:, R} V`,
:math:`dV = dY_{:, R}^\top X_{:, C}`: three products of `R C / (rows cols)` of the layer's own, for which only
:math:`X_{:, C}` is kept. Rows and columns are sorted and distinct, of any integer dtype.
"""

from __future__ import annotations

import torch

# What a CPU copies fastest is an integer as wide as the number.
_SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def take_columns(x: torch.Tensor, columns: torch.Tensor, width: int = 1) -> torch.Tensor:
    """`x[:, columns]` of `x` `[tokens, n]`, a copy; `columns` count in steps of `width`."""
    if width > 1:
        return x.unflatten(1, (-1, width)).index_select(1, columns.long()).flatten(1)
    if x.device.type != "cpu":
        return x.index_select(1, columns.long())
    # index_select along columns walks bf16 numbers one by one: 0.39 ms for a quarter of 1024 x 1024, this takes 0.11.
    numbers = x.view(_SAME_WIDTH[x.element_size()])
    return numbers.gather(1, columns.long().expand(x.shape[0], -1)).view(x.dtype)


def put_columns_(y: torch.Tensor, columns: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`y[:, columns] = new` in place, `new` of `y`'s dtype; returns `y`."""
    columns = columns.long()
    if y.device.type != "cpu":
        return y.index_copy_(1, columns, new)
    width = _SAME_WIDTH[y.element_size()]
    y.view(width).scatter_(1, columns.expand(y.shape[0], -1), new.view(width))  # half of index_copy_'s time
    return y


def add_to_columns_(y: torch.Tensor, columns: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> None:
    """`y[:, columns] += x @ matrix` in place: summed before it is rounded to `y`'s dtype."""
    if columns.numel() == y.shape[1]:
        y.addmm_(x, matrix)
    else:
        put_columns_(y, columns, torch.addmm(take_columns(y, columns), x, matrix))


def read_subgrid(weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`weight[rows][:, columns]` `[R, C]`, a copy in the weight's dtype; any strides."""
    return weight[rows.long()[:, None], columns.long()]


def write_subgrid_(
    weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Overwrite `weight` at the sub-grid with `values` `[R, C]` of its dtype, in place; returns `weight`."""
    weight[rows.long()[:, None], columns.long()] = values
    return weight


def add_subgrid_(weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`weight[rows][:, columns] += values` in place, added in the wider dtype of the two and rounded once.

    Returns the overwritten numbers, so that `write_subgrid_` restores every bit.
    """
    before = read_subgrid(weight, rows, columns)
    write_subgrid_(weight, rows, columns, (before + values).to(weight.dtype))
    return before


def subgrid_gradient(dy_rows: torch.Tensor, x_columns: torch.Tensor) -> torch.Tensor:
    r""":math:`dY_{:, R}^\top X_{:, C}` `[R, C]` from the slices `[tokens, R]` and `[tokens, C]`: fp32, or float64."""
    wide = torch.float64 if x_columns.dtype == torch.float64 else torch.float32
    return (dy_rows.t() @ x_columns).to(wide)
