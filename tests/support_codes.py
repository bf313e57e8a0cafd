"""The format of a support's buffer by its definition, a byte at a time; shares nothing with the package."""

import json
import struct
import zlib

import torch


def lines_of(granularity: int, block: int, rows: int, cols: int) -> tuple[int, int]:
    """Lines, and units of each: a line is a row of entries, unless chunks of 255 waste more than half a row."""
    total = [rows * cols, rows * cols // max(1, block) ** 2, rows, cols][granularity]
    by_rows = granularity == 0 and -(-cols // 255) * 255 <= 1.5 * cols
    return (rows, cols) if by_rows else (1, total)


def chunks_of(codes: torch.Tensor) -> list[int]:
    """The first unit of every chunk."""
    _, _, granularity, block, _, rows, cols, _ = struct.unpack("<2sBBIIIII", bytes(codes[:24].tolist()))
    lines, length = lines_of(granularity, block, rows, cols)
    return [line * length + first for line in range(lines) for first in range(0, length, 255)]


def read_codes(codes: torch.Tensor) -> list[int]:
    """Units in a buffer: a byte for each chunk counts its units, a byte for each unit says where in its chunk it is."""
    chunks = chunks_of(codes)
    counts, places = codes[24 : 24 + len(chunks)].tolist(), iter(codes[24 + len(chunks) :].tolist())
    units = [first + next(places) for first, count in zip(chunks, counts, strict=True) for _ in range(count)]
    assert not any(places), "bytes behind the last place"
    return units


def seal(codes: torch.Tensor) -> None:
    """Write the checksum that the payload has now."""
    codes[20:24] = torch.tensor(list(zlib.crc32(codes[24:].numpy()).to_bytes(4, "little")), dtype=torch.uint8)


def checksums_by_hand(tensors, metadata) -> str:
    """The checksums of a safetensors file: of each tensor by name, then of the rest of the metadata."""
    parts = [
        f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes()
        for name in sorted(tensors)
    ]
    rest = {key: value for key, value in metadata.items() if key != "crc32"}
    return "".join(f"{zlib.crc32(part):08x}" for part in (*parts, json.dumps(rest, sort_keys=True).encode()))
