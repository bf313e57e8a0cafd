"""What several adapters do to one weight, side by side on the union of their supports, and passes over all weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tuners.shared.pieces import Entries, Piece, Subgrid, Tiles, summed_entries


@dataclass(frozen=True)
class Deltas:
    """Updates of one weight by n adapters, at u entries.

    An entry that an adapter does not hold is *missing* there, which is not the same as an entry of value 0: it takes no
    part in rankings, draws and votes of that adapter. Its value is 0.
    """

    name: str
    """Name of the module."""
    shape: tuple[int, int]
    """`(out, in)` of the weight."""
    positions: Tensor | None
    """int64 `[u]`, sorted, distinct row-major positions; None: all entries of the weight."""
    values: Tensor
    """`[n, u]`, fp32 or fp64."""
    held: Tensor
    """bool `[n, u]`, which entries an adapter has."""
    importance: Tensor | None = None
    """`[n, u]`, how much an entry matters to its adapter, 0 where it has none; None: not known."""

    @property
    def rows(self) -> Tensor:
        """int64 `[u]`, the row of each entry."""
        if self.positions is None:
            rows, cols = self.shape
            return torch.arange(rows, device=self.values.device).repeat_interleave(cols)
        return self.positions // self.shape[1]

    def own(self, adapter: int) -> Tensor:
        """`[k]`, the values at the entries that one adapter has, in their order."""
        return self.values[adapter][self.held[adapter]]

    def filled(self) -> Deltas:
        """The same on all entries of the weight, none of them missing: the dense vectors of papers and their code."""
        values, importance = self._everywhere(self.values), self.importance
        importance = None if importance is None else self._everywhere(importance)
        return Deltas(self.name, self.shape, None, values, torch.ones_like(values, dtype=torch.bool), importance)

    def _everywhere(self, numbers: Tensor) -> Tensor:
        if self.positions is None:
            return numbers
        found = numbers.new_zeros(len(numbers), self.shape[0] * self.shape[1])
        found[:, self.positions] = numbers
        return found


@torch.no_grad()
def stack_deltas(
    name: str, shape: tuple[int, int], adapters: Sequence[Sequence[Piece]], dtype: torch.dtype = torch.float32
) -> Deltas:
    """The updates of one weight that `adapters` make, each a list of pieces (empty: the adapter leaves it alone).

    Entries and subgrids keep their support, zeros in it too; of dense tiles the entries that are not 0 are held, of
    factors all. Where each adapter has a support only, nothing of the weight's size is built; else `[n, out * in]`.
    """
    size = shape[0] * shape[1]
    found = [_update(pieces, shape, dtype) for pieces in adapters]
    if all(positions is not None for positions, _, _ in found):
        united = torch.unique(torch.cat([positions for positions, _, _ in found]))
        places, count = [torch.searchsorted(united, positions) for positions, _, _ in found], united.numel()
    else:
        united, places, count = None, [positions for positions, _, _ in found], size
    values = torch.zeros(len(found), count, dtype=dtype)
    held = torch.zeros(len(found), count, dtype=torch.bool)
    for at, (place, (_, own, mask)) in enumerate(zip(places, found, strict=True)):
        if place is None:
            values[at] = own
            held[at] = mask
        else:
            values[at, place] = own
            held[at, place] = True
    return Deltas(name, shape, united, values, held)


def _update(
    pieces: Sequence[Piece], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor | bool]:
    """Positions (None: all), values and, of all entries, which are held."""
    if all(isinstance(piece, (Entries, Subgrid)) for piece in pieces):
        found = summed_entries(pieces)
        if found is None:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=dtype), True
        return found[0].long().cpu(), found[1].to("cpu", dtype), True
    dense = torch.zeros(shape, dtype=dtype)
    for piece in pieces:
        piece.add_(dense)
    flat = dense.reshape(-1)
    return None, flat, flat != 0 if all(isinstance(piece, Tiles) for piece in pieces) else True


class Scan:
    """Passes over the updates of many weights, one weight at a time; nothing is kept between two of them.

    Args:
        names: modules, in sorted order: what whole-model rankings and draws go by.
        adapters: how many there are.
        read: the updates of a module.
        own: the values that one adapter has in a module; None: read from `read`.
    """

    def __init__(
        self,
        names: Sequence[str],
        adapters: int,
        read: Callable[[str], Deltas],
        own: Callable[[str, int], Tensor] | None = None,
    ) -> None:
        self.names, self.adapters, self.layer = list(names), adapters, read
        self.own = own or (lambda name, adapter: read(name).own(adapter))

    def __iter__(self) -> Iterator[Deltas]:
        return (self.layer(name) for name in self.names)

    def mapped(self, change: Callable[[Deltas], Deltas]) -> Scan:
        """Passes over what `change` makes of each weight's updates."""
        return Scan(self.names, self.adapters, lambda name: change(self.layer(name)))
