"""The folder that a reconstruction keeps its tuned blocks in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...utils.checksums import save_checked
from ...utils.file_length import read_safetensors
from ...utils.file_writing import whole_file
from ...utils.json_text import read_json_text
from ..reading.block_inputs import digest

Errors = tuple[float, float]
"""Of a block before and after."""


@dataclass
class ReconstructionCheckpoint:
    """Trained tensors of each tuned block, a file each; without a folder it keeps nothing."""

    folder: Path | None
    options: dict[str, Any]
    data: str = ""
    """Digest of the calibration data."""
    _start: dict[str, Any] = field(default_factory=dict)

    def begin(self, data: str) -> None:
        """Note the data that blocks are tuned with."""
        self.data = data

    def start(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Note what a block starts from."""
        starts = "".join(f"{name} {digest(parameter)}\n" for name, parameter in trained.items())
        start = digest(torch.frombuffer(bytearray(starts.encode() or b"-"), dtype=torch.uint8))
        self._start = json.loads(json.dumps({**self.options, "calibration data": self.data, "start": start}))

    def load(self, number: int, trained: Mapping[str, nn.Parameter]) -> Errors | None:
        """Write a block that an earlier run tuned into `trained`; None where there is none.

        Raises:
            ValueError: it is damaged, or was tuned with other options, data or from another start.
        """
        if self.folder is None or not self._file(number).exists():
            return None
        tensors, about = read_safetensors(self._file(number), checked=True)
        held, errors = _about(about, self._file(number))
        for key, value in self._start.items():
            if held.get(key) != value:
                raise ValueError(
                    f"'{self._file(number)}' was tuned with another {key}. Pass what the run began with, choose "
                    "another folder, or delete it."
                )
        for name, parameter in trained.items():
            found = tensors.get(name)
            fits = found is not None and found.shape == parameter.shape and found.dtype == parameter.dtype
            if not fits or not found.isfinite().all():
                raise ValueError(
                    f"'{self._file(number)}' has no '{name}' that fits the block: delete it, to tune the block again."
                )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])
        return errors

    def save(self, number: int, trained: Mapping[str, nn.Parameter], errors: Errors) -> None:
        """Write a tuned block, whole."""
        if self.folder is None:
            return
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trained.items()}
        about = json.dumps({**self._start, "errors": errors})
        with whole_file(self._file(number)) as temporary:
            save_checked(tensors, temporary, metadata={"reconstruction": about})

    def _file(self, number: int) -> Path:
        return self.folder / f"tuned_{number:05d}.safetensors"


def _about(metadata: Mapping[str, str], file: Path) -> tuple[dict[str, Any], Errors]:
    """How a block was tuned, and its errors.

    Raises:
        ValueError: the file does not say so.
    """
    try:
        held = read_json_text(metadata.get("reconstruction", ""))
        before, after = (float(one) for one in held["errors"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"'{file}' does not say how its block was tuned, its metadata 'reconstruction' is damaged: delete it, to "
            "tune the block again."
        ) from error
    return held, (before, after)
