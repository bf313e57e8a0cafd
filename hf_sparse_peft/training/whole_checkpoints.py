"""Checkpoints of a Trainer that a killed process left half written: found before anything is loaded from them."""

from __future__ import annotations

import functools
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from ..tuners import adapter_layers
from ..utils.file_length import check_file_length
from .runner import RuleRunner
from .upstream_start import UpstreamStartCallback

STATE = "trainer_state.json"
_WEIGHTS = ("adapter_model.safetensors", "*/adapter_model.safetensors", "model*.safetensors")
_NAME = re.compile(r"checkpoint-(\d+)")


def why_torn(folder: Path) -> str | None:
    """What is not whole in a checkpoint of a Trainer, as the end of a sentence; None for a whole one.

    Trainer writes the adapter, optimizer, scheduler, random states, and `trainer_state.json` last: without it, or
    with half of it, nothing says how far the others are. Files that a disk lost the end of are found by their length.
    """
    state = folder / STATE
    if not state.is_file():
        return f"has no {STATE}, which Trainer writes last"
    try:
        whole = isinstance(json.loads(state.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        return f"has a {STATE} that is not whole"
    for pattern in _WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            try:
                check_file_length(file)
            except ValueError as error:
                return f"is damaged: {str(error).partition('. ')[0]}"
    for file in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        with file.open("rb") as stream:
            start = stream.read(2)
        if not start or (start == b"PK" and not zipfile.is_zipfile(file)):
            return f"has its {file.name} cut off"
    return None


def checkpoints_of(folder: Path) -> list[Path]:
    """Folders `checkpoint-<step>` in it, the newest step first."""
    found = [entry for entry in folder.glob("checkpoint-*") if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=_step, reverse=True)


def whole_checkpoint(resume: str | bool | None, output_dir: str) -> str | bool | None:
    """What to resume from in place of `resume_from_checkpoint`: with True, the newest checkpoint that is whole, with a
    warning where a newer one is not.

    Raises:
        ValueError: with True, no checkpoint of `output_dir` is whole; with a folder, that one is not. Names it, and the
            newest before it that is.
    """
    if not resume:
        return resume
    if resume is not True and not Path(resume).is_dir():
        return resume  # Trainer says so
    found = checkpoints_of(Path(output_dir)) if resume is True else [Path(resume)]
    torn = why_torn(found[0]) if found else None
    if torn is None:
        return resume
    newest = found[0]
    siblings = checkpoints_of(newest.parent) if _NAME.fullmatch(newest.name) else []
    before = next((one for one in siblings if _step(one) < _step(newest) and why_torn(one) is None), None)
    what = f"The checkpoint '{newest}' {torn}: a process ended while it was written, or its disk lost a part."
    if before is None:
        raise ValueError(
            f"{what} No checkpoint before it is whole. Train from the start (resume_from_checkpoint=None); the folder "
            "is written anew then."
        )
    if resume is not True:
        raise ValueError(f"{what} The newest before it that is whole is '{before}': resume from that.")
    warnings.warn(
        f"{what} Training goes on from '{before}', the newest before it that is whole, and writes the other anew when "
        "it gets there.",
        stacklevel=3,
    )
    return str(before)


def guard_checkpoints() -> None:
    """Let `Trainer.train` look at a checkpoint before it loads from it (`whole_checkpoint`).

    A checkpoint that is there already, and is written again, loses its `trainer_state.json` first, so that a kill
    leaves no mixture of two runs that seems whole. A run that is resumed behind its last step trains no further one, as
    Trainer does where that step lies within an epoch. For runs with an adapter or a rule of this package; does nothing
    the second time.
    """
    original, save = Trainer.train, Trainer._save_checkpoint
    if getattr(save, "_begins_anew", False):
        return

    @functools.wraps(original)
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self):
            resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir)
        return original(self, resume_from_checkpoint, *args, **kwargs)

    @functools.wraps(save)
    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self) and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / STATE).unlink(missing_ok=True)
        return save(self, model, trial, *args, **kwargs)

    _save_checkpoint._begins_anew = True
    _end_at_the_last_step()
    Trainer.train, Trainer._save_checkpoint = train, _save_checkpoint


def _end_at_the_last_step() -> None:
    run_epoch = getattr(Trainer, "_run_epoch", None)
    if run_epoch is None:  # older ones have a loop of another shape
        return

    @functools.wraps(run_epoch)
    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer asks whether a step was the last one when it has made it, and so makes one more here.
        if _is_ours(self) and 0 < self.state.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return None
        return run_epoch(self, *args, **kwargs)

    Trainer._run_epoch = _run_epoch


def _is_ours(trainer: Trainer) -> bool:
    callbacks = (RuleRunner, UpstreamStartCallback)
    if any(isinstance(one, callbacks) for one in trainer.callback_handler.callbacks):
        return True
    return isinstance(trainer.model, nn.Module) and bool(adapter_layers(trainer.model))


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])
