"""Reading safetensors files: is one all there, and as it was written? Asked before anything is built for it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .checksums import CHECKSUMS, check_checksums
from .json_text import read_json_text


def check_file_length(file: Path) -> None:
    """Find a cut safetensors file, and the first tensor that it lost, where safetensors says "incomplete metadata".

    Raises:
        ValueError: the file is shorter or longer than its header says, or has no header.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
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
    if checked and CHECKSUMS not in metadata:
        raise ValueError(f"'{file}' has no checksums ('{CHECKSUMS}' in its metadata). Fetch or save it again.")
    check_checksums(tensors, metadata, file)
    return tensors, metadata
