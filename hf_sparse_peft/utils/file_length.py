"""Reading safetensors files: is one all there, and as it was written? Asked before anything is built for it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from .checksums import CHECKSUMS, check_checksums
from .json_text import read_json_text


def check_file_length(file: Path) -> None:
    """Find a cut safetensors file, and the first tensor that it lost, where safetensors says "incomplete metadata".

    Raises:
        ValueError: the file is shorter or longer than its header says, or has no header.
    """
    with file.open("rb") as stream:
        _read_header(stream, file.stat().st_size, file)


def _read_header(stream: BinaryIO, size: int, file: Path | str) -> dict[str, Any]:
    """The header of `size` bytes; raises as `check_file_length`, with `file` as the name."""
    start = stream.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or 8 + length > size:
        raise ValueError(
            f"'{file}' is truncated: it has {size} bytes and ends inside its header. Fetch or save it again."
        )
    try:
        header = read_json_text(stream.read(length))
        ends = {key: 8 + length + entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"'{file}' has no safetensors header: {error}. Fetch or save it again.") from error
    due = max(ends.values(), default=8 + length)
    if size < due:
        first = min((end, key) for key, end in ends.items() if end > size)[1]
        raise ValueError(
            f"'{file}' is truncated: it has {size} bytes of {due}, and '{first}' is the first tensor cut off. Fetch or "
            "save it again."
        )
    if size > due:
        raise ValueError(f"'{file}' has {size} bytes where its header accounts for {due}. Fetch or save it again.")
    return header


def read_safetensors(file: Path, *, checked: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of the file, on the CPU, and its metadata; with `checked`, checksums have to be there.

    Raises:
        ValueError: the file is cut or damaged, or a tensor does not match its checksum; names the file and the tensor.
    """
    check_file_length(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in sorted(opened.keys())}
            metadata = opened.metadata() or {}
    except (SafetensorError, TypeError, RuntimeError) as error:
        raise ValueError(f"'{file}' is not readable as safetensors: {error}. Fetch or save it again.") from error
    return _checked(tensors, metadata, file, checked)


def read_safetensors_bytes(data: bytes, name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """As `read_safetensors(checked=True)`, of what was received instead of written; errors call it `name`."""
    header = _read_header(io.BytesIO(data), len(data), name)
    try:
        tensors = dict(sorted(load(bytes(data)).items()))  # the library's order is any
        metadata = dict(header.get("__metadata__") or {})
    except (SafetensorError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"'{name}' is not readable as safetensors: {error}. Fetch or save it again.") from error
    return _checked(tensors, metadata, name, needed=True)


def _checked(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], file: Path | str, needed: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if needed and CHECKSUMS not in metadata:
        raise ValueError(f"'{file}' has no checksums ('{CHECKSUMS}' in its metadata). Fetch or save it again.")
    check_checksums(tensors, metadata, file)
    return tensors, metadata
