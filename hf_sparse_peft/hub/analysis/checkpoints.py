"""Checkpoints to compare: safetensors on disk, state dicts or models, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ...utils.checkpoint_index import read_index

Checkpoint = str | Path | Mapping[str, torch.Tensor] | nn.Module
SLAB = 1 << 22
"""Numbers compared at once."""


def differs(old: torch.Tensor, new: torch.Tensor, atol: float) -> torch.Tensor:
    """Bool: which numbers changed by more than `atol`, or at all where it is 0; what is not a number has changed."""
    if atol == 0:
        return old != new
    wide = torch.promote_types(old.dtype, torch.float32)
    return ~((new.to(wide) - old.to(wide)).abs() <= atol)


def pair(
    first: CheckpointTensors, second: CheckpointTensors, name: str, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of both, in one dtype.

    Raises:
        ValueError: other shapes or dtypes; names the tensor.
    """
    old, new = first.get(name), second.get(name)
    if old.shape != new.shape:
        raise ValueError(f"'{name}' has shape {tuple(old.shape)} before and {tuple(new.shape)} after.")
    if dtype is not None and old.is_floating_point():
        return old.to(dtype), new.to(dtype)
    if old.dtype != new.dtype:
        raise ValueError(
            f"'{name}' is {old.dtype} before and {new.dtype} after; rounding alone would count as change. Pass "
            "dtype=torch.bfloat16 to compare both in one dtype."
        )
    return old, new


def check_names(first: CheckpointTensors, second: CheckpointTensors) -> None:
    """Refuse checkpoints of two models; `first.names` then holds what both count.

    Raises:
        ValueError: tensors that only one has.
    """
    for this, other, label in ((first, second, "before"), (second, first, "after")):
        odd = [name for name in this.names if name not in other.names and name not in other.tied]
        if odd:
            raise ValueError(f"Only the checkpoint {label} has {odd[:3]} ({len(odd)} tensors): they are of two models.")
    # A tensor that one of them stores twice is counted where the other counts it.
    shared = set(first.names) & set(second.names)
    first.tied |= set(first.names) - shared
    first.names = [name for name in first.names if name in shared]


class CheckpointTensors:
    """A checkpoint's tensors by name, one at a time; of those that share memory, the first."""

    def __init__(self, source: Checkpoint) -> None:
        self.files: dict[str, Path] = {}
        self.held: Mapping[str, torch.Tensor] = {}
        self.tied: set[str] = set()
        if isinstance(source, (str, Path)):
            self.files = dict(_files(Path(source)))
            self.names = list(self.files)
            return
        self.held = source.state_dict() if isinstance(source, nn.Module) else source
        seen: set[tuple] = set()
        self.names = []
        for name, tensor in self.held.items():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
            if tensor.numel() and place in seen:
                self.tied.add(name)
            else:
                self.names.append(name)
            seen.add(place)

    def get(self, name: str) -> torch.Tensor:
        """One tensor."""
        if name not in self.files:
            return self.held[name].detach()
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        for name, file in sorted(read_index(index)[0].items()):
            yield name, path / file
        return
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"There is no model.safetensors (or its index) at '{path}'.")
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, file
