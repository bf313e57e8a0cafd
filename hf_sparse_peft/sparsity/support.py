"""How a weight is cut into units, and how the values of some units are read from and added to it.

    entry            block (bs=2)       row              column
    [. x . .]        [. . x x]          [. . . .]        [. x . .]
    [. . . .]        [. . x x]          [x x x x]        [. x . .]
    unit 1           unit 1             unit 1           unit 1

    diagonal (bs=2, the number of blocks)
    [. . . .]
    [. . . .]
    [. . x x]
    [. . x x]
    unit 1

A *support* is a sorted tensor of distinct unit numbers of one grid; its *values* are one small dense piece per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..ops import add_units_, diagonal_shape, read_units

Granularity = Literal["entry", "block", "row", "column", "diagonal"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


@dataclass(frozen=True)
class UnitGrid:
    r"""How a `[rows, cols]` weight is cut into units.

    | granularity | units | unit `u` holds | values of k units |
    |---|---|---|---|
    | `entry`  | `rows * cols` | `w[u // cols, u % cols]` | `[k]` |
    | `block`  | `(rows / bs) * (cols / bs)` | block `divmod(u, cols / bs)`, row-major inside | `[k, bs, bs]` |
    | `row`    | `rows` | `w[u, :]` | `[k, cols]` |
    | `column` | `cols` | `w[:, u]` | `[k, rows]` |
    | `diagonal` | about `bs` (`ops.diagonal`) | `w[uh : (u+1)h, uv : (u+1)v]` | `[k, h, v]` |

    Blocks on a diagonal have :math:`h = \lceil rows/bs \rceil` and :math:`v = \lceil cols/bs \rceil`; the last one may
    reach beyond the weight, and what it has there is padding: numbers of no effect.

    Raises:
        ValueError: unknown granularity, a side below 1, a `block_size` that does not divide both sides, or a number of
            diagonal blocks of which one would lie outside of the weight.
    """

    rows: int
    """Rows of the weight (`out_features` of a linear layer)."""
    cols: int
    """Columns of the weight (`in_features` of a linear layer)."""
    granularity: Granularity = "entry"
    """What one unit is: an entry, a square block, a row, a column, or a block on the diagonal."""
    block_size: int = 32
    """Side of a block; of a diagonal the number of blocks that it is cut into. Not read for other granularities."""

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity={self.granularity!r} is unknown. Accepted: {', '.join(GRANULARITIES)}.")
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"A weight of {self.rows}x{self.cols} has no entries; rows and cols must be at least 1.")
        if self.granularity == "block":
            size = self.block_size
            if size < 1 or self.rows % size or self.cols % size:
                common = math.gcd(self.rows, self.cols)
                fits = [d for d in range(1, min(common, 1024) + 1) if common % d == 0]
                raise ValueError(
                    f"block_size={size} does not divide a weight of {self.rows}x{self.cols}. Block sizes that do: "
                    f"{', '.join(map(str, fits))}. Or leave the module out of target_modules."
                )
        if self.granularity == "diagonal" and not _diagonal_fits(self.rows, self.cols, self.block_size):
            at = max(1, min(self.block_size, self.rows, self.cols))
            near = {n for n in range(max(1, at - 512), at + 512) if _diagonal_fits(self.rows, self.cols, n)}
            near = sorted(near | {math.gcd(self.rows, self.cols)}, key=lambda n: abs(n - at))[:5]
            raise ValueError(
                f"diagonal_blocks={self.block_size} leaves a diagonal block of a weight of {self.rows}x{self.cols} "
                f"without rows or without columns: it could not learn. The nearest numbers that fit: "
                f"{', '.join(map(str, sorted(near)))}. Or leave the module out of target_modules."
            )

    @property
    def num_units(self) -> int:
        """How many units the weight has."""
        if self.granularity == "entry":
            return self.rows * self.cols
        if self.granularity == "block":
            return (self.rows // self.block_size) * (self.cols // self.block_size)
        if self.granularity == "diagonal":
            return diagonal_shape(self.rows, self.cols, self.block_size)[0]
        return self.rows if self.granularity == "row" else self.cols

    @property
    def unit_numel(self) -> int:
        """How many numbers one unit has. `num_units * unit_numel == rows * cols`, but for a diagonal, which is a part
        of the weight and may end in padding."""
        if self.granularity == "diagonal":
            return math.prod(self.values_shape(1))
        return self.rows * self.cols // self.num_units

    @property
    def padding(self) -> int:
        """How many numbers of the last unit lie outside of the weight: those of a diagonal that does not divide it."""
        if self.granularity != "diagonal":
            return 0
        number, height, width = diagonal_shape(self.rows, self.cols, self.block_size)
        inside = (self.rows - (number - 1) * height) * (self.cols - (number - 1) * width)
        return height * width - inside

    @property
    def cut_size(self) -> int:
        """`block_size` where the granularity reads it, else 0: grids of one granularity and `cut_size` cut a weight
        alike."""
        return self.block_size if self.granularity in ("block", "diagonal") else 0

    @property
    def unit_name(self) -> str:
        """What messages call one unit."""
        return "diagonal block" if self.granularity == "diagonal" else self.granularity

    @property
    def index_dtype(self) -> torch.dtype:
        """`torch.int32`, or `torch.int64` from 2**31 units on."""
        return torch.int32 if self.num_units < 2**31 else torch.int64

    def values_shape(self, k: int) -> tuple[int, ...]:
        """Shape of the values of `k` units: `(k,)`, `(k, bs, bs)`, `(k, cols)`, `(k, rows)` or `(k, h, v)`."""
        if self.granularity == "entry":
            return (k,)
        if self.granularity == "block":
            return (k, self.block_size, self.block_size)
        if self.granularity == "diagonal":
            return (k, *diagonal_shape(self.rows, self.cols, self.block_size)[1:])
        return (k, self.cols) if self.granularity == "row" else (k, self.rows)

    def entry_positions(self, units: Tensor) -> Tensor:
        """Flat row-major positions in `[rows, cols]` of every entry of `units` (`[k]`, any integer dtype).

        Returns int64 `[k, unit_numel]`, laid out as `values.reshape(k, -1)`; -1 for padding.
        """
        u = units.long().unsqueeze(1)
        if self.granularity == "entry":
            return u
        if self.granularity == "row":
            return u * self.cols + torch.arange(self.cols, device=u.device)
        if self.granularity == "column":
            return u + torch.arange(self.rows, device=u.device) * self.cols
        if self.granularity == "diagonal":
            height, width = self.values_shape(1)[1:]
            row = u[:, :, None] * height + torch.arange(height, device=u.device)[:, None]
            column = u[:, :, None] * width + torch.arange(width, device=u.device)
            inside = (row < self.rows) & (column < self.cols)
            return torch.where(inside, row * self.cols + column, -1).flatten(1)
        size, across = self.block_size, self.cols // self.block_size
        corner = (u // across) * (size * self.cols) + (u % across) * size
        side = torch.arange(size, device=u.device)
        return corner + (side[:, None] * self.cols + side).reshape(-1)

    def as_entries(self, units: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The same update with single entries as its units: sorted flat positions (int64) and values, both
        `[k * unit_numel]` (less by padding), of `units` `[k]` and `values` `values_shape(k)`. Differentiable in
        `values`."""
        positions, order = self.entry_positions(units).reshape(-1).sort()
        if self.padding:
            outside = int((positions < 0).sum())
            positions, order = positions[outside:], order[outside:]
        return positions, values.reshape(-1)[order]

    def gather(self, dense: Tensor, units: Tensor) -> Tensor:
        """The values of `units` (`[k]`, any integer dtype, in range) in `dense` (`[rows, cols]`, any strides).

        Returns a copy of shape `values_shape(k)` in `dense`'s dtype. Units are not checked against the grid: that
        would wait for the device at every step. `decode_support` checks what comes from a file.

        Raises:
            ValueError: `dense` is not `[rows, cols]`.
        """
        self._check_dense(dense)
        return read_units(dense, units, self.granularity, self.block_size).contiguous()

    @torch.no_grad()
    def scatter_add_(self, dense: Tensor, units: Tensor, values: Tensor) -> Tensor:
        """`dense[units] += values` in place, added in fp32 and cast to `dense`'s dtype once; autograd does not see it.

        `dense`: `[rows, cols]`, any float dtype and strides (a transposed view is written through). `units`: `[k]`
        distinct integers in range. `values`: `values_shape(k)`, any float dtype. float64 operands add in float64.
        Returns `dense`.

        Raises:
            ValueError: `dense` is not `[rows, cols]`, or `values` is not `values_shape(k)`.
        """
        self._check_dense(dense)
        expected = self.values_shape(units.numel())
        if tuple(values.shape) != expected:
            raise ValueError(
                f"values have shape {tuple(values.shape)}, but {units.numel()} units of granularity "
                f"'{self.granularity}' of a {self.rows}x{self.cols} weight take {expected}."
            )
        # A delta cast to bf16 before the addition loses up to half its bits: one rounding, after the addition.
        wide = torch.promote_types(torch.promote_types(dense.dtype, values.dtype), torch.float32)
        add_units_(dense, units, values.to(wide), self.granularity, self.block_size)
        return dense

    def count_for_density(self, density: float, name: str = "") -> int:
        r"""`floor(density * num_units)`, where a product within float error of an integer counts as that integer.

        Raises:
            ValueError: `density` outside (0, 1], or too small to leave one unit; names the module `name`.
        """
        where = f" in '{name}'" if name else ""
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density={density}{where} must be in (0, 1]: it is the fraction of units in the support.")
        exact = density * self.num_units
        nearest = round(exact)
        # 0.29 * 100 is 28.999999999999996: a few units in the last place below an integer are that integer.
        count = nearest if abs(exact - nearest) <= 1e-12 * max(1.0, exact) else math.floor(exact)
        if count == 0:
            least = 1 / self.num_units
            digits = 10 ** (1 - math.floor(math.log10(least)))  # two of them, rounded up
            least = math.ceil(least * digits - 1e-9) / digits
            raise ValueError(
                f"density={density} leaves no {self.unit_name}{where} ({self.rows}x{self.cols}, {self.num_units} "
                f"units). Raise density to at least {least:.1e}, or drop the module from target_modules."
            )
        return min(count, self.num_units)

    def _check_dense(self, dense: Tensor) -> None:
        if tuple(dense.shape) != (self.rows, self.cols):
            raise ValueError(
                f"The weight has shape {tuple(dense.shape)}, but this support belongs to one of "
                f"({self.rows}, {self.cols}). Pass the weight as [rows, cols] (transpose Conv1D, dequantise 4-bit)."
            )


def _diagonal_fits(rows: int, cols: int, blocks: int) -> bool:
    """Whether each of the diagonal's blocks has rows and columns of the weight."""
    if blocks < 1:
        return False
    number, height, width = diagonal_shape(rows, cols, blocks)
    return number * height - rows < height and number * width - cols < width
