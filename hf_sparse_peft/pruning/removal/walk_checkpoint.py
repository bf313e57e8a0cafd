"""The folder that a pruning walk keeps its finished blocks in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...utils.checksums import save_checked
from ...utils.file_length import read_safetensors
from ...utils.file_writing import whole_file
from ...utils.json_text import read_json_text
from ..reading.block_inputs import Block, digest
from ..reading.one_shot import PrunableLayer

WALK_FILE = "pruning.json"
DATA = "calibration data"
Pruned = dict[str, tuple[Tensor, Tensor]]
"""Weight and mask of what was removed, by layer."""


@dataclass
class WalkCheckpoint:
    """Finished blocks of a walk, a file each; without a folder it keeps nothing."""

    folder: Path | None
    data: str = ""
    """Digest of the calibration data; empty for none."""

    def begin(self, about: dict[str, Any], layers: list[PrunableLayer]) -> None:
        """Start the folder, or find it as a walk with these options left it.

        Raises:
            ValueError: it is of another walk, or its description cannot be read.
        """
        if self.folder is None:
            return
        about = json.loads(
            json.dumps({**about, "weights": {layer.name: list(layer.weight().shape) for layer in layers}})
        )
        file = self.folder / WALK_FILE
        if file.exists():
            found = _read(file)
            other = [key for key in about if found.get(key) != about[key]]
            if other:
                raise ValueError(
                    f"'{self.folder}' holds another pruning walk, with another {other[0]}. Choose another folder, or "
                    "delete it."
                )
            return
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def _file(self, number: int) -> Path:
        return self.folder / f"block_{number:05d}.safetensors"

    def load(self, number: int, block: Block) -> Pruned | None:
        """A block that an earlier call finished; None where there is none.

        Raises:
            ValueError: it is damaged, or made with other weights or data.
        """
        if self.folder is None or not self._file(number).exists():
            return None
        tensors, digests = read_safetensors(self._file(number), checked=True)
        if digests.get(DATA, "") != self.data:
            raise ValueError(
                f"'{self._file(number)}' was pruned with other calibration data, or the same in another order. Pass a "
                "dataloader that does not shuffle, choose another folder, or delete it."
            )
        found = {}
        for layer in block.layers:
            weight, gone = tensors.get(f"{layer.name}.weight"), tensors.get(f"{layer.name}.removed")
            old = layer.weight()
            fits = weight is not None and gone is not None and weight.shape == gone.shape == old.shape
            if not fits or weight.dtype != old.dtype or not weight.isfinite().all() or weight[gone.bool()].any():
                raise ValueError(f"'{self._file(number)}' does not fit '{layer.name}': delete it, to prune it again.")
            weight = weight.to(old.device)
            if digests.get(layer.name) != digest(old) and not torch.equal(weight, old):
                raise ValueError(
                    f"'{self._file(number)}' was pruned from another weight of '{layer.name}' than this model has. "
                    "Load the model that the walk began with, choose another folder, or delete it."
                )
            found[layer.name] = (weight, gone.bool().to(old.device))
        return found

    def save(self, number: int, block: Block, pruned: Pruned) -> None:
        """Write a finished block, whole, before its layers change."""
        if self.folder is None or self._file(number).exists():
            return
        tensors = {}
        for name, (weight, gone) in pruned.items():
            tensors[f"{name}.weight"] = weight.contiguous().cpu()
            tensors[f"{name}.removed"] = gone.to(torch.uint8).contiguous().cpu()
        digests = {layer.name: digest(layer.weight()) for layer in block.layers} | {DATA: self.data}
        with whole_file(self._file(number)) as temporary:
            save_checked(tensors, temporary, metadata=digests)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = read_json_text(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not readable as JSON: {error}. Delete the folder, or choose another.") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{file}' does not describe a pruning walk. Delete the folder, or choose another.")
    return found
