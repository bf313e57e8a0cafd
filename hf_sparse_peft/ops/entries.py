"""How the entries of a support are kept, a byte each, and what a product unpacks them to.

A line of `length` units (a row of the weight, or all units in one line) is cut into chunks of 255. A unit is one byte,
its place in its chunk, and each chunk has a byte that counts its units:

    units 3, 300, 511 of a line of 600      counts 1 1 1      places 3, 45, 1

so that the columns of all entries, row by row, come out of one `repeat_interleave` and one addition, at about a
nanosecond an entry on a CPU. Nothing wider is kept from one product to the next.
"""

from __future__ import annotations

from functools import cached_property

import torch

CHUNK = 255
# Chunks that end with their row would waste too many counts on narrow weights.
_MOST_WASTE = 1.5


def entry_lines(rows: int, cols: int) -> tuple[int, int]:
    """Lines that the entries of a `[rows, cols]` weight are cut along, and units of a line: its rows, or all in one."""
    by_rows = -(-cols // CHUNK) * CHUNK <= _MOST_WASTE * cols
    return (rows, cols) if by_rows else (1, rows * cols)


def chunk_count(lines: int, length: int) -> int:
    """Chunks of all lines."""
    return lines * -(-length // CHUNK)


def chunk_starts(lines: int, length: int, device: torch.device | str) -> torch.Tensor:
    """The first unit of every chunk, int32, or int64 from 2^31 units on."""
    dtype = torch.int32 if lines * length < 2**31 else torch.int64
    inside = torch.arange(0, length, CHUNK, dtype=dtype, device=device)
    if lines == 1:
        return inside
    return (torch.arange(0, lines * length, length, dtype=dtype, device=device)[:, None] + inside).view(-1)


def pack_units(units: torch.Tensor, lines: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted distinct `units` (`[k]`, any integer dtype) as bytes: places `[k]` and counts `[chunk_count]`."""
    units = units.long()
    line = torch.div(units, length, rounding_mode="floor")
    inside = units - line * length
    chunk = torch.div(inside, CHUNK, rounding_mode="floor")
    counts = torch.bincount(line * -(-length // CHUNK) + chunk, minlength=chunk_count(lines, length))
    return (inside - chunk * CHUNK).to(torch.uint8), counts.to(torch.uint8)


def unpack_units(places: torch.Tensor, counts: torch.Tensor, lines: int, length: int) -> torch.Tensor:
    """The units that `pack_units` packed, int32, or int64 from 2^31 units on."""
    starts = chunk_starts(lines, length, places.device)
    return torch.repeat_interleave(starts, counts.int(), output_size=places.numel()).add_(places)


def pack_entries(units: torch.Tensor, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted entry `units` of a `[rows, cols]` weight as places and counts (see the module)."""
    return pack_units(units, *entry_lines(rows, cols))


def unpack_entries(places: torch.Tensor, counts: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The units that `pack_entries` packed."""
    return unpack_units(places, counts, *entry_lines(rows, cols))


class EntryIndex:
    """The entries of one support while a product runs, in the forms that its parts read, made when first asked for.

    Args:
        units: sorted int32 or int64 units `[k]`, or places `[k]` with `counts`.
        counts: of `pack_entries`.
        rows, cols: sides of the weight.
        live_rows, live_columns: sorted int32 or int64; a sub-grid that all entries lie in, where one is known.
    """

    def __init__(
        self,
        units: torch.Tensor,
        counts: torch.Tensor | None,
        rows: int,
        cols: int,
        live_rows: torch.Tensor | None = None,
        live_columns: torch.Tensor | None = None,
    ) -> None:
        self._units, self._counts = units, counts
        self.rows, self.cols = rows, cols
        self.live_rows, self.live_columns = (None if side is None else side.int() for side in (live_rows, live_columns))

    def numel(self) -> int:
        """Entries."""
        return self._units.numel()

    @property
    def subgrid(self) -> tuple[int, int] | None:
        """Sides of the sub-grid, where one is known."""
        return None if self.live_rows is None else (self.live_rows.numel(), self.live_columns.numel())

    @cached_property
    def flat(self) -> torch.Tensor:
        """Units `row * cols + col`, int64 `[k]`."""
        if self._counts is None:
            return self._units.long()
        return unpack_entries(self._units, self._counts, self.rows, self.cols).long()

    @cached_property
    def compressed_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each row starts and the last one ends, int32 `[rows + 1]`, and the columns, int32 `[k]`."""
        if self._counts is not None and entry_lines(self.rows, self.cols)[0] == self.rows:
            counts = self._counts.int()
            starts = torch.zeros(self.rows + 1, dtype=torch.int32, device=counts.device)
            torch.cumsum(counts.view(self.rows, -1).sum(1, dtype=torch.int32), 0, out=starts[1:])
            first = torch.arange(0, self.cols, CHUNK, dtype=torch.int32, device=counts.device).repeat(self.rows)
            columns = torch.repeat_interleave(first, counts, output_size=self._units.numel())
            return starts, columns.add_(self._units)
        bounds = torch.arange(self.rows + 1, device=self.flat.device) * self.cols
        starts = torch.searchsorted(self.flat, bounds)
        first = torch.repeat_interleave(bounds[:-1], starts.diff(), output_size=self.numel())
        return starts.int(), (self.flat - first).int()

    @cached_property
    def inside(self) -> torch.Tensor:
        """Places `r * C + c` in the sub-grid `[R, C]`, int64 `[k]`."""
        starts, columns = self.compressed_rows
        count = self.live_columns.numel()
        place = torch.empty(self.cols, dtype=torch.int64, device=columns.device)
        place[self.live_columns.long()] = torch.arange(count, device=columns.device)
        first = torch.arange(self.live_rows.numel(), device=columns.device) * count
        per_row = starts.diff().index_select(0, self.live_rows)
        first = torch.repeat_interleave(first, per_row, output_size=self.numel())
        return first.add_(place.index_select(0, columns))


def live_lines(units: torch.Tensor, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns in which the entry `units` lie, int32, sorted."""
    alive = [torch.zeros(side, dtype=torch.bool, device=units.device) for side in (rows, cols)]
    row = torch.div(units, cols, rounding_mode="floor")
    alive[0][row.long()] = True
    alive[1][(units - row * cols).long()] = True
    return tuple(side.nonzero().squeeze(1).int() for side in alive)
