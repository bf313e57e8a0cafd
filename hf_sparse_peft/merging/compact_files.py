"""One safetensors file of coded updates: tensors with checksums, and what they are as JSON in the metadata."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..tuners.shared.file_check import CONFIG_FILE, LONGEST_SIDE, WEIGHTS_FILE
from ..utils.checksums import save_checked
from ..utils.file_length import check_file_length, read_safetensors
from ..utils.file_writing import whole_file
from ..utils.json_text import read_json_text
from ..utils.parts import plain
from .heads import MEAN, merged_others
from .sources import AdapterSource

_ABOUT = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "base_overrides", "modules_to_save",
          "saved_base_weights", "bias")  # fmt: skip
_OTHER = "other:"
"""Prefix of heads and biases in the file."""


@dataclass
class Compact:
    """What such a file holds."""

    kind: str
    """Which codec: "compeft", "bitdelta"."""
    shapes: dict[str, tuple[int, int]]
    """Module -> `(out, in)`."""
    modules: dict[str, dict[str, Any]]
    """Module -> what its coded tensors are, as JSON has it."""
    tensors: dict[str, Tensor] = field(repr=False)
    """Coded tensors by name."""
    others: dict[str, Tensor] = field(repr=False)
    """Heads and biases by their keys in an adapter file, as they were."""
    about: dict[str, Any] = field(repr=False)
    """Base, task, heads."""

    def tensor(self, name: str) -> Tensor:
        """A coded tensor.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.tensors:
            raise ValueError(f"it lacks the tensor '{name}'")
        return self.tensors[name]


def about_of(source: AdapterSource) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Heads and biases of an adapter, and the options that its file is to keep."""
    others, heads = merged_others([source], [1.0], MEAN)
    return others, {name: plain({**source.config, **heads}.get(name)) for name in _ABOUT}


def write_compact(compact: Compact, path: str | os.PathLike) -> int:
    """Write the file, whole or not at all; returns its size in bytes."""
    header = {
        "format": f"hf-sparse-peft {compact.kind} 1",
        "modules": json.dumps({n: {"shape": list(compact.shapes[n]), **d} for n, d in compact.modules.items()}),
        "about": json.dumps(compact.about, default=str),
    }
    tensors = {**compact.tensors, **{f"{_OTHER}{key}": tensor for key, tensor in compact.others.items()}}
    with whole_file(path) as file:
        save_checked({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file, header)
    return Path(path).stat().st_size


def read_compact(path: str | os.PathLike, kind: str) -> Compact:
    """Read the file whole: length, checksums, description.

    Raises:
        ValueError: it is missing, no file of this codec, or damaged; names what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' is no file; give one that was written by this package's {kind} codec.")
    tensors, header = read_safetensors(path, checked=True)
    if header.get("format") != f"hf-sparse-peft {kind} 1":
        raise ValueError(f"'{path}' has format={header.get('format')!r}: it is no {kind} file of this release.")
    try:
        modules = dict(read_json_text(header["modules"]))
        about = dict(read_json_text(header["about"]))
        shapes = {name: _shape(described.pop("shape"), name) for name, described in modules.items()}
        if set(about) != set(_ABOUT):
            raise ValueError(f"its options are {sorted(about)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"'{path}' is damaged: its description is unreadable ({error}). Fetch or write it again."
        ) from error
    others = {name.removeprefix(_OTHER): t for name, t in tensors.items() if name.startswith(_OTHER)}
    own = {name: t for name, t in tensors.items() if not name.startswith(_OTHER)}
    return Compact(kind, shapes, modules, own, others, about)


def kind_of(path: Path) -> str | None:
    """Which codec wrote the file; None: none of this package's, as far as its header says.

    Raises:
        ValueError: it is cut, or no safetensors file.
    """
    check_file_length(path)
    with safe_open(path, framework="pt") as opened:
        words = (opened.metadata() or {}).get("format", "").split(" ")
    return words[1] if len(words) == 3 and words[0] == "hf-sparse-peft" else None


def _shape(given: Any, name: str) -> tuple[int, int]:
    if len(given) != 2 or not all(type(side) is int and 0 < side < LONGEST_SIDE for side in given):
        raise ValueError(f"'{name}' has the shape {given}")
    return tuple(given)


def number(described: Mapping[str, Any], name: str, most: float = math.inf) -> int:
    """A count in a description.

    Raises:
        ValueError: it is no integer from 0 to `most`.
    """
    found = described.get(name)
    if type(found) is not int or not 0 <= found <= most:
        raise ValueError(f"its description says {name}={found!r}")
    return found


def scales_of(tensor: Tensor, count: int, name: str) -> Tensor:
    """fp32 `[count]` of finite numbers of at least 0.

    Raises:
        ValueError: it is none of that.
    """
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (count,):
        raise ValueError(f"'{name}' is {tensor.dtype} of shape {tuple(tensor.shape)}; {count} fp32 numbers are due")
    if not bool(torch.isfinite(tensor).all()) or bool((tensor < 0).any()):
        raise ValueError(f"'{name}' has numbers below 0 or not finite")
    return tensor


@contextmanager
def as_folder(compact: Compact) -> Iterator[Path]:
    """A temporary folder with heads and options, as bases are loaded by."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(compact.about))
        save_file({"none": torch.zeros(1), **compact.others}, Path(folder) / WEIGHTS_FILE)
        yield Path(folder)
