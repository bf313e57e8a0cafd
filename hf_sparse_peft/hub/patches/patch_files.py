"""`Patch` <-> one safetensors file: values as they are, positions coded, a description of every tensor as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...utils.checksums import CHECKSUMS, save_checked
from ...utils.file_length import read_safetensors
from ...utils.file_writing import whole_file
from ...utils.json_text import read_json_text
from . import positions as coding
from .weight_patch import Patch, WeightPatch, weight_patch

SUPPORT_FILE, MODULES_FILE = "patch.safetensors", "modules.safetensors"
_FORMAT = "hf-sparse-peft weight patch 1"


def write_patch(patch: Patch, path: str | os.PathLike) -> int:
    """Write `patch` to the file `path`, whole or not at all; returns its size in bytes.

    Positions take 2 + log2(mean gap) bits each at most, those of rows and blocks nearly none.
    """
    tensors, described = {}, {}
    for weight in patch.weights:
        description, coded = _coded(weight)
        described[weight.name] = description
        tensors |= coded
        if weight.name in patch.base_digests:
            description["base"] = patch.base_digests[weight.name]
    header = {"format": _FORMAT, "unchanged": str(patch.unchanged), "tensors": json.dumps(described)}
    with whole_file(path) as file:
        save_checked(tensors, file, header)
    return Path(path).stat().st_size


def read_patch(path: str | os.PathLike) -> Patch:
    """The patch in a file of `write_patch`, or in the files of a folder of `export_patch(format="vllm")`, all checked.

    Raises:
        ValueError: it is no such file, or it is damaged; names the tensor.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in (SUPPORT_FILE, MODULES_FILE) if (path / name).is_file()]
        if not files:
            raise ValueError(f"'{path}' has neither {SUPPORT_FILE} nor {MODULES_FILE}; give what export_patch wrote.")
        parts = [read_patch(file) for file in files]
        digests = {name: digest for part in parts for name, digest in part.base_digests.items()}
        return Patch(sum((p.weights for p in parts), ()), digests, sum(p.unchanged for p in parts))
    tensors, header = read_safetensors(path)
    if header.get("format") != _FORMAT:
        raise ValueError(f"'{path}' is no weight patch of this package; give a file that export_patch wrote.")
    if CHECKSUMS not in header:
        raise ValueError(f"'{path}' is damaged: it has no checksums; copy or export it again.")
    try:
        described = read_json_text(header.get("tensors", ""))
        unchanged = int(header.get("unchanged", ""))
        weights = tuple(_decoded(name, description, tensors) for name, description in described.items())
        digests = {name: str(d["base"]) for name, d in described.items() if "base" in d}
        return Patch(weights, digests, unchanged)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        lacks = "its description lacks " if isinstance(error, KeyError) else ""
        raise ValueError(f"'{path}' is damaged: {lacks}{error}; copy or export it again.") from error


def coded_bytes(weight: WeightPatch) -> int:
    """Bytes that the tensors of one item take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _coded(weight)[1].values())


def _coded(weight: WeightPatch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name, shape, dtype, values, indices = weight
    described = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "count": values.numel()}
    tensors = {f"{name}:values": values}
    if indices is None:
        return described | {"positions": "all"}, tensors
    positions, size = indices.long(), weight.numel
    count = positions.numel()
    orders = {"runs": positions}
    if len(shape) == 2:
        orders["runs of columns"] = _columns_first(positions.clone(), *shape)
    for kind, ordered in orders.items():
        starts, ends = coding.runs_of(ordered)
        runs = starts.numel()
        if coding.code_length(runs, size) + coding.code_length(runs, count) < coding.code_length(count, size):
            tensors[f"{name}:starts"] = coding.encode(starts, size)
            tensors[f"{name}:ends"] = coding.encode(ends - 1, count)
            return described | {"positions": kind, "runs": runs}, tensors
    tensors[f"{name}:positions"] = coding.encode(positions, size)
    return described | {"positions": "single"}, tensors


def _columns_first(positions: Tensor, rows: int, cols: int) -> Tensor:
    """Row-major positions in `[rows, cols]` as column-major ones, sorted, in their own
    memory; with rows and cols exchanged the way back."""
    for piece in positions.split(8 * coding.PIECE):
        piece.copy_(piece % cols * rows + piece // cols)
    positions.numpy().sort()  # in its place: torch's sort has an int64 index beside it
    return positions


def _decoded(name: str, described: dict[str, Any], file: Mapping[str, Tensor]) -> WeightPatch:
    shape, count, kind = tuple(described["shape"]), described["count"], described["positions"]
    whole = [count, described.get("runs", 0), *shape]
    size = math.prod(shape) if all(type(one) is int and one >= 0 for one in whole) else -1
    if not 0 <= size < 2**63:
        raise ValueError(f"'{name}' has shape={shape}, count={count}: these are no sizes of a tensor")
    dtype, values = getattr(torch, described["dtype"], None), file[f"{name}:values"]
    if values.ndim != 1 or values.dtype != dtype or values.numel() != count:
        raise ValueError(f"'{name}:values' is {values.dtype} of {values.numel()}; described are {count} of {dtype}.")
    if kind == "all":
        return weight_patch(name, shape, values, None)
    if kind == "single":
        found = coding.decode(file[f"{name}:positions"], count, size, f"{name}:positions")
    elif kind == "runs" or (kind == "runs of columns" and len(shape) == 2):
        runs = described["runs"]
        starts = coding.decode(file[f"{name}:starts"], runs, size, f"{name}:starts")
        ends = coding.decode(file[f"{name}:ends"], runs, count, f"{name}:ends") + 1
        found = coding.positions_of(starts, ends)
        if not coding.rises(found, size):
            raise ValueError(f"'{name}:starts' is damaged: its runs overlap, or end beyond {size} entries.")
        if kind == "runs of columns":
            found = _columns_first(found, shape[1], shape[0])
    else:
        raise ValueError(f"'{name}' has positions={kind!r}, which this version does not know.")
    return weight_patch(name, shape, values, found)
