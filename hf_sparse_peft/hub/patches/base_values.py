"""The values of a checkpoint that a patch is made against: a model's own weights, or safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...utils.checkpoint_index import read_index
from .checkpoint_names import CheckpointNames

BaseTensor = Callable[[str], Tensor]
"""Returns a checkpoint's tensor by its name there; only to be read."""


def base_tensors(base: nn.Module | str | os.PathLike | CheckpointNames) -> BaseTensor:
    """Reader of the checkpoint `base`: a model without adapters, or a folder of safetensors files, which is mapped,
    not read: only the pages that are asked for come from the disk.

    Raises:
        ValueError: `base` is no such folder.
    """
    if isinstance(base, CheckpointNames):
        return base.tensor
    if isinstance(base, nn.Module):
        return CheckpointNames(base).tensor
    return _Folder(Path(base)).tensor


class _Folder:
    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            found, _ = read_index(index)
        elif (folder / "model.safetensors").is_file():
            found = None
        else:
            raise ValueError(
                f"base='{folder}' has no model.safetensors and no model.safetensors.index.json; give the folder of a "
                "checkpoint in that format, or a plain model loaded from it."
            )
        names = {"model.safetensors"} if found is None else set(found.values())
        try:
            self._files = {name: safe_open(folder / name, framework="pt") for name in sorted(names)}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"The weights in base='{folder}' cannot be read ({error}).") from error
        self._where = {key: file for file in self._files.values() for key in file.keys()}  # noqa: SIM118
        self._folder = folder

    def tensor(self, name: str) -> Tensor:
        if name not in self._where:
            raise ValueError(
                f"'{name}' is not in the checkpoint '{self._folder}'; it has {sorted(self._where)[:2]} and others. "
                "Give the checkpoint that the adapter's base was loaded from."
            )
        return self._where[name].get_tensor(name)
