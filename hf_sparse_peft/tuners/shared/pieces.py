r"""Pieces: what an adapter adds to one weight, in forms that merging, export, combination and cards read.

:math:`\Delta W = \sum_p \Delta_p`, `[out, in]`, over the pieces that `AdapterLayer.pieces` returns:

| piece | update | leaves as |
|---|---|---|
| `LowRank` | :math:`s\,B\,\mathrm{diag}(g)\,A` | LoRA, exactly |
| `Decomposed` | :math:`\mathrm{diag}(m/n)(W + P) - W` with a low-rank P | DoRA, exactly |
| `Entries` | values at the units of a support | rows and columns: LoRA, exactly; all: SHiRA, exactly |
| `Subgrid` | a dense matrix at some rows x some columns | LoRA of the smaller side's rank, SHiRA, exactly |
| `Tiles` | a dense matrix that is built tile after tile | SHiRA where most of it is zero, else LoRA by SVD |
| `BaseMask` | :math:`-(1 - M) \\odot W`: the base's weights off the mask go | SHiRA, exactly; merged, exact zeros |
| `InputMap` | :math:`W Q - W`: the layer's input is mapped | dense, exactly; LoRA by SVD |
| `OutputMap` | :math:`H W - W`: the layer's output is mapped | dense, exactly; LoRA by SVD |
| `Nonlinear` | no change of a weight | nothing |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import add_subgrid_
from ...sparsity import UnitGrid, unpack_bits


class Piece:
    """One summand of an adapter's update of one weight."""

    @property
    def exact_rank(self) -> int | None:
        """Rank of a LoRA that equals this piece; None where only the piece's numbers could tell."""
        return None

    def add_(self, weight: Tensor) -> None:
        """Add the piece to `weight` `[out, in]`, any float dtype and strides, in place and without gradients."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        r""":math:`A` `[k, in]` and :math:`B` `[out, k]`, fp32, with :math:`BA` equal to the piece and k its
        `exact_rank`.

        Raises:
            ValueError: the piece has no exact low-rank form.
        """
        raise ValueError(f"{type(self).__name__} has no exact low-rank form.")

    def entries(self) -> tuple[Tensor, Tensor]:
        """Sorted, distinct flat positions (row-major, int64 `[n]`) and fp32 values `[n]` of the piece's entries.

        Raises:
            ValueError: the piece is a product of factors: all of its entries may differ from zero.
        """
        raise ValueError(f"{type(self).__name__} has no list of entries.")


@dataclass(frozen=True)
class LowRank(Piece):
    r""":math:`\Delta W = s\,B\,\mathrm{diag}(g)\,A`."""

    B: Tensor
    """`[out, r]`."""
    A: Tensor
    """`[r, in]`."""
    gate: Tensor | None = None
    """`[r]`, g; None: ones. A component whose gate is 0 is dead."""
    scale: float = 1.0
    """s."""

    @property
    def exact_rank(self) -> int:
        """Number of living components."""
        return self.A.shape[0] if self.gate is None else int((self.gate != 0).sum())

    @torch.no_grad()
    def add_(self, weight: Tensor) -> None:
        """Add the piece to `weight`: the product in the wider of the factors' dtypes, one rounding to the weight's."""
        B = self.B * self.scale
        if self.gate is not None:
            B = B * self.gate
        dtype = torch.promote_types(B.dtype, self.A.dtype)  # after model.half() a product with fp32 bases is half fp32
        weight.copy_((weight + B.to(dtype) @ self.A.to(dtype)).to(weight.dtype))

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """The living components of A, and of B with scale and gate multiplied in."""
        A, B = self.A.float(), self.B.float() * self.scale
        if self.gate is not None:
            gate = self.gate.float()
            A, B = A[gate != 0], (B * gate)[:, gate != 0]
        return A, B


@dataclass(frozen=True)
class Decomposed(Piece):
    r"""Direction and magnitude trained apart, :math:`\Delta W = \mathrm{diag}(m/n)(W + P) - W` with a low-rank P and
    :math:`n_i = \|W_i + P_i\|` (DoRA; Liu et al., 2024). It is alone in its layer."""

    low_rank: LowRank
    """P."""
    magnitude: Tensor
    """`[out]`, m."""
    weight: Callable[[], Tensor]
    """The base weight W, `[out, in]`; not to be written to."""

    @property
    def exact_rank(self) -> int:
        """Rank of a DoRA that equals this piece."""
        return self.low_rank.A.shape[0]

    @torch.no_grad()
    def add_(self, weight: Tensor) -> None:
        """Add the piece to `weight`, in fp32 or wider."""
        base = self.weight().to(weight.dtype)
        moved = base.clone()
        self.low_rank.add_(moved)
        weight += moved * (self.magnitude.to(moved.dtype) / moved.norm(dim=1))[:, None] - base

    def factors(self) -> tuple[Tensor, Tensor]:
        """Those of P, dead components too; a DoRA has `magnitude` beside them."""
        P = self.low_rank
        B = P.B.float() * P.scale
        return P.A.float(), B if P.gate is None else B * P.gate.float()

    def dense(self) -> Tiles:
        """The piece as the dense update that it is."""

        def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
            update = torch.zeros(self.weight().shape, device=self.magnitude.device)
            self.add_(update)
            yield slice(None), slice(None), update

        return Tiles(tuple(self.weight().shape), tiles, dense=True)


@dataclass(frozen=True)
class Entries(Piece):
    """Values at the units of a support."""

    units: Tensor
    """`[k]` sorted, distinct units of `grid`, any integer dtype."""
    values: Tensor
    """`grid.values_shape(k)`, any float dtype."""
    grid: UnitGrid
    """How the weight is cut into units."""

    @property
    def exact_rank(self) -> int | None:
        """k rows or columns have rank k, an empty support has rank 0; entries and blocks: None."""
        count = self.units.numel()
        return count if not count or self.grid.granularity in ("row", "column") else None

    @torch.no_grad()
    def add_(self, weight: Tensor) -> None:
        """Add the values to `weight` at their places, in fp32, rounded once."""
        self.grid.scatter_add_(weight, self.units, self.values)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Values and one-hot vectors: k rows are `A`, k columns are `B`.

        Raises:
            ValueError: a support of entries or blocks.
        """
        if self.exact_rank is None:
            return super().factors()
        grid, values = self.grid, self.values.float()
        if not self.units.numel():
            return values.new_zeros(0, grid.cols), values.new_zeros(grid.rows, 0)
        one_hot = torch.zeros(self.units.numel(), grid.num_units, device=values.device)
        one_hot.scatter_(1, self.units.long().unsqueeze(1), 1.0)
        return (values, one_hot.t()) if grid.granularity == "row" else (one_hot, values.t())

    @torch.no_grad()
    def entries(self) -> tuple[Tensor, Tensor]:
        """Every entry of every unit, zeros too."""
        return self.grid.as_entries(self.units, self.values.float())


@dataclass(frozen=True)
class Subgrid(Piece):
    """A dense matrix at the crossings of some rows and some columns."""

    rows: Tensor
    """`[R]` sorted and distinct, any integer dtype."""
    columns: Tensor
    """`[C]` likewise."""
    values: Tensor
    """`[R, C]`, any float dtype."""
    shape: tuple[int, int]
    """`(out, in)`."""

    @property
    def exact_rank(self) -> int:
        """The smaller of R and C."""
        return min(self.values.shape)

    @torch.no_grad()
    def add_(self, weight: Tensor) -> None:
        """Add the values to `weight` at their places, in fp32, rounded once."""
        add_subgrid_(weight, self.rows, self.columns, self.values.detach())

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """The values, and one-hot vectors on the side that has fewer."""
        values = self.values.float()
        on_rows = torch.zeros(self.shape[0], self.rows.numel(), device=values.device)
        on_rows[self.rows.long(), torch.arange(self.rows.numel())] = 1.0
        on_columns = torch.zeros(self.columns.numel(), self.shape[1], device=values.device)
        on_columns[torch.arange(self.columns.numel()), self.columns.long()] = 1.0
        if values.shape[0] <= values.shape[1]:
            return values @ on_columns, on_rows
        return on_columns, on_rows @ values

    @torch.no_grad()
    def entries(self) -> tuple[Tensor, Tensor]:
        """Every entry, zeros too."""
        positions = self.rows.long()[:, None] * self.shape[1] + self.columns.long()
        return positions.reshape(-1), self.values.float().reshape(-1)

    def as_entries(self) -> Entries:
        """The same update with single entries as its units."""
        return Entries(*self.entries(), UnitGrid(*self.shape, "entry"))


@dataclass(frozen=True)
class Tiles(Piece):
    """A dense update that exists one tile at a time."""

    shape: tuple[int, int]
    """`(out, in)`."""
    tiles: Callable[[], Iterator[tuple[slice, slice, Tensor]]]
    """A fresh pass over tiles that cover the weight, each once: its rows, its columns, and the update there, detached
    and in any float dtype."""
    dense: bool = False
    """Whether few of its entries are zero."""

    @torch.no_grad()
    def add_(self, weight: Tensor) -> None:
        """Add tile after tile to `weight`, each in the weight's dtype."""
        for rows, columns, tile in self.tiles():
            weight[rows, columns] += tile.to(weight.dtype)

    @torch.no_grad()
    def entries(self) -> tuple[Tensor, Tensor]:
        """The entries that are not zero."""
        positions, values = [], []
        for rows, columns, tile in self.tiles():
            row, column = tile.nonzero(as_tuple=True)
            values.append(tile[row, column].float())
            positions.append((row + rows.indices(self.shape[0])[0]) * self.shape[1])
            positions[-1] += column + columns.indices(self.shape[1])[0]
        order = torch.cat(positions).sort()
        return order.values, torch.cat(values)[order.indices]


@dataclass(frozen=True)
class BaseMask(Piece):
    r"""What a mask takes from the base, :math:`-(1 - M) \odot W`. Merging lets it act first, and once for all adapters
    (`zero_removed_`): what is removed is exactly 0 then, or what other pieces add there."""

    bits: Tensor
    """The bits of M, row-major, uint8 `[ceil(out * in / 8)]`."""
    shape: tuple[int, int]
    """`(out, in)`."""
    weight: Callable[[], Tensor]
    """The base weight W, `[out, in]`; not to be written to."""

    def removed(self, device: torch.device | None = None) -> Tensor:
        """Bool `[out, in]`, 1 - M."""
        bits = self.bits if device is None else self.bits.to(device)
        return unpack_bits(bits, self.shape[0] * self.shape[1]).logical_not_().view(self.shape)

    @torch.no_grad()
    def add_(self, weight: Tensor) -> None:
        """Subtract W off the mask, in fp32 or wider."""
        base, removed = self.weight().to(weight.dtype), self.removed(weight.device)
        weight -= base.masked_fill(~removed, 0)

    @torch.no_grad()
    def entries(self) -> tuple[Tensor, Tensor]:
        """The entries that are removed and were not 0, with the negative of what they were."""
        weight = self.weight()
        removed = self.removed(weight.device) & (weight != 0)
        return removed.view(-1).nonzero().squeeze(1), -weight[removed].float()


@dataclass(frozen=True)
class InputMap(Piece):
    r"""What a linear map of the layer's input does to its weight, :math:`W Q - W` for inputs :math:`x \mapsto Q x`."""

    apply: Callable[[Tensor], Tensor]
    """:math:`X \\mapsto X Q^\top`, `[..., in]`, of detached tensors of any float dtype."""
    weight: Callable[[], Tensor]
    """The base weight W, `[out, in]`; not to be written to."""

    def mapped(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """:math:`W Q`, a new `[out, in]`: what the map's backward pass makes of the rows of W; Q is never built."""
        with torch.inference_mode(False), torch.enable_grad():
            weight = self.weight().detach().to(dtype)
            x = torch.zeros_like(weight, requires_grad=True)
            return torch.autograd.grad(self.apply(x), x, weight)[0]

    @torch.no_grad()
    def add_(self, weight: Tensor) -> None:
        """Add the change to `weight`, in fp32 or wider."""
        weight += self.mapped(weight.dtype) - self.weight().to(weight.dtype)

    @torch.no_grad()
    def entries(self) -> tuple[Tensor, Tensor]:
        """The entries that change."""
        return _nonzero(self.mapped() - self.weight().float())


@dataclass(frozen=True)
class OutputMap(Piece):
    r"""What a linear map of the layer's output does to its weight, :math:`H W - W` for outputs :math:`y \mapsto H y`.
    Whether the bias is mapped too, or shifted, is the layer's `bias_change`."""

    apply: Callable[[Tensor], Tensor]
    """:math:`Y \\mapsto Y H^\top`, `[..., out]`, of detached tensors of any float dtype."""
    weight: Callable[[], Tensor]
    """What is mapped, `[out, in]`: the base weight, or W Q of an `InputMap` before; not to be written to."""

    @torch.no_grad()
    def change(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """:math:`H W - W`, a new `[out, in]`."""
        weight = self.weight().to(dtype)
        return self.apply(weight.t()).t() - weight

    @torch.no_grad()
    def add_(self, weight: Tensor) -> None:
        """Add the change to `weight`, in fp32 or wider."""
        weight += self.change(weight.dtype)

    @torch.no_grad()
    def entries(self) -> tuple[Tensor, Tensor]:
        """The entries that change."""
        return _nonzero(self.change())


@dataclass(frozen=True)
class Nonlinear(Piece):
    """A function of the layer's input or output that is no change of its weight. All that reads updates refuses it."""

    what: str
    """For messages, as the beginning of a sentence: "Adapter 'a' of form Bottleneck in 'q_proj'"."""

    def refusal(self) -> ValueError:
        """The error of what would need an update of the weight."""
        return ValueError(
            f"{self.what} is a nonlinear function beside the weight and no change of it: it can neither be merged nor "
            "be exported to a format of weights or of LoRA. Save it with save_pretrained and load it with this package."
        )

    def add_(self, weight: Tensor) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise self.refusal()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise self.refusal()

    def entries(self) -> tuple[Tensor, Tensor]:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise self.refusal()


EVERYWHERE = (LowRank, Decomposed, InputMap, OutputMap)
"""Pieces that change every entry of a weight."""


def _nonzero(update: Tensor) -> tuple[Tensor, Tensor]:
    positions = update.reshape(-1).nonzero().squeeze(1)
    return positions, update.reshape(-1)[positions].float()


@torch.no_grad()
def zero_removed_(weight: Tensor, pieces: Sequence[Piece]) -> None:
    """Let the `BaseMask` among the pieces act on `weight` `[out, in]`, which is the base's own: exact zeros, however
    many masks remove an entry."""
    for piece in pieces:
        if isinstance(piece, BaseMask):
            weight.masked_fill_(piece.removed(weight.device), 0)


def summed_entries(pieces: Sequence[Piece]) -> tuple[Tensor, Tensor] | None:
    """Sorted flat positions and fp32 values of the sum of the pieces; None where there are none.

    Raises:
        ValueError: a piece is a product of factors.
    """
    found = [piece.entries() for piece in pieces]
    found = [(positions, values) for positions, values in found if positions.numel()]
    if len(found) < 2:
        return found[0] if found else None
    united, at = torch.unique(torch.cat([positions for positions, _ in found]), return_inverse=True)
    values = torch.cat([values for _, values in found])
    return united, values.new_zeros(united.numel()).index_add_(0, at, values)
