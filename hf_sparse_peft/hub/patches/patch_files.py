"""`Patch` <-> one safetensors file: values as they are, positions coded, a description of every tensor as JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...utils.file_writing import whole_file
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
        save_file(tensors, file, metadata=header)
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
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ValueError(f"'{path}' is no weight patch of this package; give a file that export_patch wrote.")
            described = json.loads(header["tensors"])
            weights = tuple(_decoded(name, description, file) for name, description in described.items())
            digests = {name: d["base"] for name, d in described.items() if "base" in d}
            return Patch(weights, digests, int(header["unchanged"]))
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged ({error}); copy or export it again.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged: its description lacks {error}; copy or export it again.") from error


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
        orders["runs of columns"] = _columns_first(positions, *shape)
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
    """Row-major positions in `[rows, cols]` as column-major ones, sorted; with rows and cols exchanged the way back."""
    return (positions % cols * rows + positions // cols).sort().values


def _decoded(name: str, described: dict[str, Any], file: Any) -> WeightPatch:
    shape, count, kind = tuple(described["shape"]), described["count"], described["positions"]
    dtype, size = getattr(torch, described["dtype"], None), math.prod(shape)
    values = file.get_tensor(f"{name}:values")
    if values.dtype != dtype or values.numel() != count:
        raise ValueError(f"'{name}:values' is {values.dtype} of {values.numel()}; described are {count} of {dtype}.")
    if kind == "all":
        return weight_patch(name, shape, values, None)
    if kind == "single":
        found = coding.decode(file.get_tensor(f"{name}:positions"), count, size, f"{name}:positions")
    elif kind == "runs" or (kind == "runs of columns" and len(shape) == 2):
        runs = described["runs"]
        starts = coding.decode(file.get_tensor(f"{name}:starts"), runs, size, f"{name}:starts")
        ends = coding.decode(file.get_tensor(f"{name}:ends"), runs, count, f"{name}:ends") + 1
        found = coding.positions_of(starts, ends)
        if kind == "runs of columns":
            found = _columns_first(found, shape[1], shape[0])
    else:
        raise ValueError(f"'{name}' has positions={kind!r}, which this version does not know.")
    return weight_patch(name, shape, values, found)
