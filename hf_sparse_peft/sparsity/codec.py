r"""A support as a fixed-length byte buffer, about 1.4 bytes a unit at density 1 %.

    | header, 24 bytes                                          | payload: capacity + ceil(num_units / 255) bytes   |
    | "SU" version granularity block_size count rows cols crc32 | gap gap 255 gap 255 255 gap ... 255 255 255 (pad) |

Every gap is `unit - previous - 1` with `previous = -1` before the first unit. It is written as `gap // 255` bytes of
255 ("skip 255, no unit here") and one byte `gap % 255`, which stands for a unit. So the bytes below 255 are the units,
two equal or swapped units cannot be written at all, and trailing 255s are padding. `a <= capacity` units take
`a + sum(gap // 255) <= capacity + floor(num_units / 255)` bytes, hence the fixed length: the shape follows from the
config and the layer alone, and every checkpoint loader works. All integers are little-endian.
"""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor

from .support import GRANULARITIES, UnitGrid

HEADER_BYTES = 24
FORMAT_VERSION = 1
_MAGIC = b"SU"
_HEADER = struct.Struct("<2sBBIIIII")  # magic, version, granularity, block size, count, rows, cols, crc32
_SKIP = 255


def codes_length(grid: UnitGrid, capacity: int) -> int:
    """Bytes of the buffer that holds up to `capacity` units of `grid`: header, one byte a unit, one per 255 skipped.

    Raises:
        ValueError: `capacity` outside `0 .. num_units`, or a grid beyond the header's 32-bit fields.
    """
    if not 0 <= capacity <= grid.num_units:
        raise ValueError(f"capacity={capacity} must be between 0 and the {grid.num_units} units of the weight.")
    if max(grid.rows, grid.cols, capacity, grid.block_size) >= 2**32:
        raise ValueError(f"{grid} with capacity={capacity} does not fit the header: every field must be below 2**32.")
    return HEADER_BYTES + capacity + -(-grid.num_units // _SKIP)


def encode_support(units: Tensor, grid: UnitGrid, capacity: int) -> Tensor:
    """Gap-codes `units` (`[a]`, any integer dtype, sorted, distinct, `a <= capacity`).

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
    codes = torch.full((length,), _SKIP, dtype=torch.uint8, device=units.device)
    payload = codes[HEADER_BYTES:]
    if count:
        u = units.long()
        gaps = torch.diff(u, prepend=u.new_full((1,), -1)).sub_(1)
        # The first unit's own sign is in its gap, so one minimum finds disorder, duplicates and negatives alike.
        if int(gaps.min()) < 0:
            raise ValueError(
                "units must be sorted, distinct and non-negative; call torch.sort or torch.unique before encoding."
            )
        if int(u[-1]) >= grid.num_units:
            raise ValueError(f"unit {int(u[-1])} is out of range: {grid} has units 0 .. {grid.num_units - 1}.")
        skips = gaps // _SKIP
        at = torch.cumsum(skips, 0).add_(torch.arange(count, device=u.device))
        payload[at] = gaps.sub_(skips.mul_(_SKIP)).to(torch.uint8)
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
            f"The support of '{name}' has granularity '{kind}' with block_size={block_size}, but the config asks for "
            f"'{grid.granularity}' with block_size={_layout(grid)[1]}. Use the adapter_config.json saved with the "
            f"file."
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
    at = (payload != _SKIP).nonzero().squeeze(1)
    if at.numel() != count:
        raise ValueError(f"The support of '{name}' says it holds {count} units, but {at.numel()} are coded.")
    if count == 0:
        return torch.empty(0, dtype=grid.index_dtype, device=codes.device)
    # Byte p is the i-th unit, so p - i skips of 255 lie before it: no running sum over the payload is needed.
    steps = payload[at].long().add_(1).cumsum(0)
    units = at.sub_(torch.arange(count, device=at.device)).mul_(_SKIP).add_(steps).sub_(1)
    if int(units[-1]) >= grid.num_units:
        raise ValueError(
            f"The support of '{name}' holds unit {int(units[-1])}, out of range: a weight of {rows}x{cols} has "
            f"{grid.num_units} units."
        )
    return units.to(grid.index_dtype)


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
    header = bytes(codes[:HEADER_BYTES].cpu().tolist())
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


def _layout(grid: UnitGrid) -> tuple[int, int]:
    """Granularity code and block size as the header holds them; block_size means nothing off blocks, so 0 there."""
    return GRANULARITIES.index(grid.granularity), grid.block_size if grid.granularity == "block" else 0
