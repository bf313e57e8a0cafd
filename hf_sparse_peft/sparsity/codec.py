r"""A support as a fixed-length byte buffer: a byte a unit, and one for every 255 units of the weight.

    | header, 24 bytes                                          | counts: a byte a chunk | places: capacity bytes |
    | "SU" version granularity block_size count rows cols crc32 | 2 0 1 ...              | 7 254 0 ... (0 0 0)    |

The units of a weight lie on lines (entries: rows of the weight, as far as `ops.entry_lines` keeps those apart; else
all on one), and lines are cut into chunks of 255. Each chunk has the number of its living units in `counts`, and each
living unit its place in its chunk, 0 to 254, in `places`, in order; bytes behind the last place are 0. So the shape
follows from the config and the layer alone, every checkpoint loader works, and the engine reads entries from the buffer
as it is: no other copy of them is kept (`ops.EntryIndex`). All integers are little-endian.
"""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

from ..ops import CHUNK, chunk_count, entry_lines, pack_units, unpack_units
from .support import GRANULARITIES, UnitGrid

HEADER_BYTES = 24
FORMAT_VERSION = 1
_MAGIC = b"SU"
_HEADER = struct.Struct("<2sBBIIIII")  # magic, version, granularity, block size, count, rows, cols, crc32


def coded_lines(grid: UnitGrid) -> tuple[int, int]:
    """Lines that the units of `grid` are cut along, and units of each."""
    return entry_lines(grid.rows, grid.cols) if grid.granularity == "entry" else (1, grid.num_units)


def coded_parts(codes: Tensor, grid: UnitGrid, count: int) -> tuple[Tensor, Tensor]:
    """Places of the `count` units in `codes`, and the counts of all chunks: views, as `ops.unpack_units` takes them."""
    places = HEADER_BYTES + chunk_count(*coded_lines(grid))
    return codes[places : places + count], codes[HEADER_BYTES:places]


def coded_header(codes: Tensor) -> bytes:
    """The header of `codes`. Two buffers with the same one hold the same units."""
    return bytes(codes[:HEADER_BYTES].cpu().tolist())


def codes_length(grid: UnitGrid, capacity: int) -> int:
    """Bytes of the buffer that holds up to `capacity` units of `grid`: header, one byte a unit, one a chunk.

    Raises:
        ValueError: `capacity` outside `0 .. num_units`, or a grid beyond the header's 32-bit fields.
    """
    if not 0 <= capacity <= grid.num_units:
        raise ValueError(f"capacity={capacity} must be between 0 and the {grid.num_units} units of the weight.")
    if max(grid.rows, grid.cols, capacity, grid.block_size) >= 2**32:
        raise ValueError(f"{grid} with capacity={capacity} does not fit the header: every field must be below 2**32.")
    return HEADER_BYTES + chunk_count(*coded_lines(grid)) + capacity


def encode_support(units: Tensor, grid: UnitGrid, capacity: int) -> Tensor:
    """Codes `units` (`[a]`, any integer dtype, sorted, distinct, `a <= capacity`).

    Returns uint8 `[codes_length(grid, capacity)]` on `units`' device. Temporaries are `O(a)`, never `O(num_units)`
    words.

    Raises:
        ValueError: units not 1-D integers, unsorted, duplicated, out of range, or more than `capacity`.
    """
    length = codes_length(grid, capacity)
    if units.ndim != 1 or units.is_floating_point() or units.is_complex() or units.dtype == torch.bool:
        raise ValueError(f"units must be a 1-D integer tensor, got {units.dtype} of shape {tuple(units.shape)}.")
    count = units.numel()
    if count > capacity:
        raise ValueError(f"{count} units do not fit a support of capacity={capacity}.")
    codes = torch.zeros(length, dtype=torch.uint8, device=units.device)
    payload = codes[HEADER_BYTES:]
    if count:
        u = units.long()
        # With -1 before the first unit, one minimum finds disorder, duplicates and negatives alike.
        if int(torch.diff(u, prepend=u.new_full((1,), -1)).min()) < 1:
            raise ValueError(
                "units must be sorted, distinct and non-negative; call torch.sort or torch.unique before encoding."
            )
        if int(u[-1]) >= grid.num_units:
            raise ValueError(f"unit {int(u[-1])} is out of range: {grid} has units 0 .. {grid.num_units - 1}.")
        for part, found in zip(coded_parts(codes, grid, count), pack_units(u, *coded_lines(grid)), strict=True):
            part.copy_(found)
    header = _HEADER.pack(
        _MAGIC, FORMAT_VERSION, *_layout(grid), count, grid.rows, grid.cols, zlib.crc32(payload.cpu().numpy())
    )
    codes[:HEADER_BYTES] = torch.frombuffer(bytearray(header), dtype=torch.uint8).to(codes.device)
    return codes


def decode_support(codes: Tensor, grid: UnitGrid, capacity: int, name: str) -> Tensor:
    """The units in `codes` (uint8 `[codes_length(grid, capacity)]`), checked before anything uses them.

    Returns `[a]` sorted distinct units of `grid.index_dtype` on `codes`' device, `a <= capacity`.

    Raises:
        ValueError: naming the module `name`, for a buffer never written, of another dtype, length, version, base
            shape, granularity or block size, with a wrong count or checksum, or with a unit out of range.
    """
    length = codes_length(grid, capacity)
    granularity, block_size, count, rows, cols, checksum = _read_header(codes, name)
    if (rows, cols) != (grid.rows, grid.cols):
        raise ValueError(
            f"The support of '{name}' was made for a weight of {rows}x{cols}, but the base has "
            f"{grid.rows}x{grid.cols}. Load the adapter on the base model that it was trained on."
        )
    if (granularity, block_size) != _layout(grid):
        kind = GRANULARITIES[granularity] if granularity < len(GRANULARITIES) else f"code {granularity}"
        raise ValueError(
            f"The support of '{name}' has granularity '{kind}' with {_cut_name(kind)}={block_size}, but the config "
            f"asks for '{grid.granularity}' with {_cut_name(grid.granularity)}={_layout(grid)[1]}. Use the "
            f"adapter_config.json saved with the file."
        )
    if codes.numel() != length:
        raise ValueError(
            f"The support of '{name}' has {codes.numel()} bytes where capacity={capacity} takes {length}: the file is "
            f"truncated, or belongs to a config of another density."
        )
    if count > capacity:
        raise ValueError(f"The support of '{name}' says it holds {count} units; its capacity is {capacity}.")
    payload = codes[HEADER_BYTES:]
    if zlib.crc32(payload.contiguous().cpu().numpy()) != checksum:
        raise ValueError(
            f"The support of '{name}' does not match its checksum: the file is damaged. Fetch or save it again."
        )
    places, counts = coded_parts(codes, grid, count)
    coded = int(counts.sum())
    if coded != count:
        raise ValueError(f"The support of '{name}' says it holds {count} units, but {coded} are coded.")
    if count == 0:
        return torch.empty(0, dtype=grid.index_dtype, device=codes.device)
    units = _unpacked(places, counts, *coded_lines(grid))
    if not _in_order(units, places, counts, *coded_lines(grid)):
        raise ValueError(
            f"The support of '{name}' has units out of order or out of range: a weight of {rows}x{cols} has "
            f"{grid.num_units} units. The file is damaged."
        )
    return units.to(grid.index_dtype)


def _unpacked(places: Tensor, counts: Tensor, lines: int, length: int) -> Tensor:
    """`unpack_units`, on the CPU by some lines at a time: it has an index beside its result."""
    step = max(lines * 2**17 // places.numel(), 1)
    if places.device.type != "cpu" or step >= lines:
        return unpack_units(places, counts, lines, length)
    per_line, done = chunk_count(1, length), 0
    units = torch.empty(places.numel(), dtype=torch.int32 if lines * length < 2**31 else torch.int64)
    for first in range(0, lines, step):
        some = counts[first * per_line : (first + step) * per_line]
        end = done + int(some.sum())
        piece = unpack_units(places[done:end], some, min(step, lines - first), length)
        units[done:end] = piece.to(units.dtype) + first * length
        done = end
    return units


def _in_order(units: Tensor, places: Tensor, counts: Tensor, lines: int, length: int) -> bool:
    """Whether places of valid counts rise within each chunk and end with it."""
    per_line = chunk_count(1, length)
    by_line = counts.view(lines, per_line)[:, -1]
    ends = counts.cumsum(0).view(lines, per_line)[:, -1]
    tails = places[ends[by_line > 0] - 1]  # where places rise, the last one of a chunk is the highest
    inside = bool((places < CHUNK).all() and (tails < length - CHUNK * (per_line - 1)).all())
    return inside and bool((units[1:] > units[:-1]).all())


def coded_grid(codes: Tensor, name: str) -> UnitGrid:
    """The grid that the header of `codes` says they were made for; neither units nor checksum are looked at.

    Raises:
        ValueError: naming the module `name`, for a buffer without a readable header.
    """
    granularity, block_size, _, rows, cols, _ = _read_header(codes, name)
    kind = GRANULARITIES[granularity] if granularity < len(GRANULARITIES) else f"code {granularity}"
    try:
        return UnitGrid(rows, cols, kind, block_size) if block_size else UnitGrid(rows, cols, kind)
    except ValueError as error:
        raise ValueError(f"The support of '{name}' has a damaged header: {error}") from error


def _read_header(codes: Tensor, name: str) -> tuple[int, int, int, int, int, int]:
    """Granularity code, block size, count, rows, columns, checksum."""
    if codes.dtype != torch.uint8 or codes.ndim != 1:
        raise ValueError(
            f"The support of '{name}' must be a 1-D torch.uint8 buffer, got {codes.dtype} of shape "
            f"{tuple(codes.shape)}. Was the model cast as a whole, buffers included? Load the adapter again."
        )
    if codes.is_meta:
        raise ValueError(f"The support of '{name}' is on the meta device: load the adapter's weights first.")
    if codes.numel() < HEADER_BYTES:
        raise ValueError(
            f"The support of '{name}' has {codes.numel()} bytes, less than its header's {HEADER_BYTES}: the file is "
            "truncated."
        )
    header = coded_header(codes)
    if not any(header):
        raise ValueError(
            f"The support of '{name}' was not yet written: its buffer is as it was allocated. The checkpoint lacks "
            f"its indices, or the layer was not initialised; load a file that holds '{name}', or initialise the "
            f"adapter."
        )
    magic, version, *found = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ValueError(f"The support of '{name}' does not begin with {_MAGIC!r}: these are not support codes.")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"The support of '{name}' has format version {version}; this release reads version {FORMAT_VERSION}. "
            f"Update hf-sparse-peft."
        )
    return tuple(found)


def _cut_name(granularity: str) -> str:
    """The config's option that the header's block size is."""
    return "diagonal_blocks" if granularity == "diagonal" else "block_size"


def _layout(grid: UnitGrid) -> tuple[int, int]:
    """Granularity code and block size as the header holds them (of a diagonal its number of blocks); 0 where the
    granularity does not read it."""
    return GRANULARITIES.index(grid.granularity), grid.cut_size
