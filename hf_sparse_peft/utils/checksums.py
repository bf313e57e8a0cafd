"""Checksums in the metadata of safetensors files: numbers that were damaged on the way are found, and named.

They guard against accident. Who edits a file on purpose can write new ones.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from torch import Tensor

CHECKSUMS = "crc32"
"""The metadata's key."""


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor in row-major order, uint8 on the CPU; the tensor's own memory where that is possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def checksums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """8 hexadecimal digits a tensor, in the order of their names, the CRC-32 of name, dtype, shape and bytes; and 8 of
    the other metadata."""
    described = json.dumps({key: value for key, value in metadata.items() if key != CHECKSUMS}, sort_keys=True)
    last = zlib.crc32(described.encode())
    return "".join(f"{one:08x}" for one in (*(_checksum(name, tensors[name]) for name in sorted(tensors)), last))


def save_checked(
    tensors: Mapping[str, Tensor], file: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """`safetensors.torch.save_file` with checksums, which `read_safetensors` compares."""
    metadata = dict(metadata or {})
    save_file(dict(tensors), file, metadata={**metadata, CHECKSUMS: checksums(tensors, metadata)})


def checked_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """What `save_checked` would write, as bytes to send (`file_length.read_safetensors_bytes`)."""
    return save(dict(tensors), metadata={**metadata, CHECKSUMS: checksums(tensors, metadata)})


def check_checksums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path | str) -> None:
    """Compare tensors with the checksums that were written with them, if there are any.

    Raises:
        ValueError: a tensor is not the one that was written, or is missing or surplus; names it.
    """
    if CHECKSUMS not in metadata:
        return
    written, found, names = metadata[CHECKSUMS], checksums(tensors, metadata), sorted(tensors)
    if len(written) != len(found):
        raise ValueError(
            f"'{file}' holds {len(names)} tensors, {names[:3]} and on, and its metadata has checksums of "
            f"{len(written) / 8 - 1:g}. Fetch or save it again."
        )
    for at, name in enumerate((*names, "__metadata__")):
        if written[8 * at : 8 * at + 8] != found[8 * at : 8 * at + 8]:
            raise ValueError(
                f"'{name}' in '{file}' does not match its checksum: it is not what was written under that name. Fetch "
                "or save the file again."
            )


def _checksum(name: str, tensor: Tensor) -> int:
    described = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(raw_bytes(tensor).numpy(), described)
