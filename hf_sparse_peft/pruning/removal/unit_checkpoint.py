"""The folder of a walk that removes heads and channels: scores of the dense model, and what each block keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...utils.checksums import save_checked
from ...utils.file_length import read_safetensors
from ...utils.file_writing import whole_file
from ...utils.json_text import read_json_text
from ..criteria.structured_methods import Scored
from ..reading.block_inputs import Block, digest
from ..units.structure import BlockStructure, Kind
from .walk_checkpoint import DATA, WalkCheckpoint

SCORES_FILE = "scores.safetensors"
IMPORTANCE = "importance"
AFTER = "after "


class UnitCheckpoint(WalkCheckpoint):
    """Scores are written before any weight changes, so that a walk that goes on never scores a model of which a part is
    gone; zeroing a unit twice changes nothing."""

    def load_scores(self, blocks: list[Block]) -> Scored | None:
        """Scores that an earlier call found; None where there are none.

        Raises:
            ValueError: they are damaged, of other weights or data, or gone while finished blocks are there.
        """
        if self.folder is None:
            return None
        file = self.folder / SCORES_FILE
        if not file.exists():
            if any(self._file(number).exists() for number in range(len(blocks))):
                raise ValueError(f"'{self.folder}' has finished blocks without '{SCORES_FILE}': delete it, load the "
                                 "model again, and begin anew.")  # fmt: skip
            return None
        tensors, metadata = read_safetensors(file, checked=True)
        self._same_data(file, metadata)
        for number, block in enumerate(blocks):
            for layer in () if self._file(number).exists() else block.layers:  # finished ones are checked by load_units
                if metadata.get(layer.name) != digest(layer.weight()):
                    raise ValueError(
                        f"'{file}' was made with another weight of '{layer.name}' than this model has. Load the model "
                        "that the walk began with, choose another folder, or delete it."
                    )
        scores: dict[str, dict[Kind, Tensor]] = {}
        for key, value in tensors.items():
            block, _, kind = key.rpartition(".")
            scores.setdefault(block, {})[kind] = value
            if value.dim() != 1 or not value.is_floating_point() or not value.isfinite().all():
                raise ValueError(f"'{key}' in '{file}' holds no scores: delete the folder, to begin anew.")
        order = [block.name for block in blocks if block.name in scores]
        return Scored({name: scores[name] for name in order}, _importance(metadata, file))

    def save_scores(self, found: Scored, blocks: list[Block]) -> None:
        """Write scores, whole, before any weight changes."""
        if self.folder is None:
            return
        tensors = {
            f"{b}.{kind}": value.contiguous() for b, kinds in found.scores.items() for kind, value in kinds.items()
        }
        metadata = {layer.name: digest(layer.weight()) for block in blocks for layer in block.layers}
        metadata |= {DATA: self.data, IMPORTANCE: json.dumps(found.importance)}
        with whole_file(self.folder / SCORES_FILE) as temporary:
            save_checked(tensors, temporary, metadata=metadata)

    def load_units(
        self, number: int, block: Block, structure: BlockStructure, kinds: frozenset[Kind]
    ) -> dict[Kind, Tensor] | None:
        """Sorted units that a finished block keeps; None where it is not finished.

        Raises:
            ValueError: it is damaged, or made with other weights or data.
        """
        if self.folder is None or not self._file(number).exists():
            return None
        file = self._file(number)
        tensors, metadata = read_safetensors(file, checked=True)
        self._same_data(file, metadata)
        for kind in kinds:
            units = tensors.get(kind)
            fits = units is not None and units.dtype == torch.int64 and units.dim() == 1
            if (
                not fits
                or bool((units.diff() <= 0).any())
                or bool(((units < 0) | (units >= structure.units(kind))).any())
            ):
                raise ValueError(f"'{file}' does not fit '{block.name}': delete it, to prune it again.")
        for layer in block.layers:
            if digest(layer.weight()) not in (metadata.get(layer.name), metadata.get(AFTER + layer.name)):
                raise ValueError(
                    f"'{file}' was pruned from another weight of '{layer.name}' than this model has. Load the model "
                    "that the walk began with, choose another folder, or delete it."
                )
        return {kind: tensors[kind] for kind in sorted(kinds)}

    def save_units(self, number: int, block: Block, structure: BlockStructure, kept: dict[Kind, Tensor]) -> None:
        """Write what a block keeps, whole, before its layers change."""
        if self.folder is None or self._file(number).exists():
            return
        metadata = {DATA: self.data}
        for layer in block.layers:
            metadata[layer.name] = digest(layer.weight())
            metadata[AFTER + layer.name] = digest(_zeroed(layer.weight(), layer.name, structure, kept))
        with whole_file(self._file(number)) as temporary:
            save_checked({kind: units.contiguous() for kind, units in kept.items()}, temporary, metadata=metadata)

    def _same_data(self, file, metadata: dict[str, str]) -> None:
        if metadata.get(DATA, "") != self.data:
            raise ValueError(
                f"'{file}' was made with other calibration data, or the same in another order. Pass a dataloader that "
                "does not shuffle, choose another folder, or delete it."
            )


def _importance(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    try:
        found = read_json_text(metadata.get(IMPORTANCE, "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"'{file}' has no readable '{IMPORTANCE}': delete the folder, to begin anew.")
    return found


def _zeroed(weight: Tensor, name: str, structure: BlockStructure, kept: dict[Kind, Tensor]) -> Tensor:
    weight = weight.clone()
    for kind, units in kept.items():
        gone = torch.ones(structure.units(kind), dtype=torch.bool)
        gone[units] = False
        for member in structure.members(kind):
            if member.module == name:
                weight.index_fill_(member.axis, member.lines(gone.nonzero().flatten()).to(weight.device), 0)
    return weight
