"""Checkpoints of a Trainer that a killed process left half written: found before anything is loaded from them."""

from __future__ import annotations

import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..rules.collectives import all_reduce_sum, rank, world_size
from ..tuners import adapter_layers
from ..utils.file_length import check_file_length
from .runner import RuleRunner
from .trainer_checks import sharding_switched_on
from .upstream_start import UpstreamStartCallback

STATE = "trainer_state.json"
_WEIGHTS = ("adapter_model.safetensors", "*/adapter_model.safetensors", "model*.safetensors")
_ARCHIVES = ("*.pt", "*.pth", "*.bin", "*/*.distcp")
_TRAINING = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*"), "scheduler": ("scheduler.pt",),
    "random states": ("rng_state.pth", "rng_state_0.pth"),
}  # fmt: skip
"""What a resumed run reads besides weights: all of it, or nothing (`save_only_model`)."""
_NONE_BEFORE = (
    "No checkpoint before it is whole. Train from the start (resume_from_checkpoint=None); the folder is written anew "
    "then."
)
_ZIP_END = b"PK\x05\x06"
"""Begins the last 22 bytes of an archive without a comment."""
_METADATA = ".metadata"
_SHARD = re.compile(rb"__\d+_\d+\.distcp")
_NAME = re.compile(r"checkpoint-(\d+)")


def why_torn(folder: Path) -> str | None:
    """What is not whole in a checkpoint of a Trainer, as the end of a sentence; None for a whole one.

    Trainer writes the adapter, optimizer, scheduler, random states, and `trainer_state.json` last: without it, or
    with half of it, nothing says how far the others are. Files that a disk lost, or lost the end of, are found by those
    that go with them, and by their ends. That one rank's random states are missing is not seen: fewer processes may
    have written them than read them.
    """
    if not (folder / STATE).is_file():
        return f"has no {STATE}, which Trainer writes last"
    if not _is_json(folder / STATE):
        return f"has a {STATE} that is not whole"
    return _lost_file(folder) or _cut_file(folder)


def _lost_file(folder: Path) -> str | None:
    there = {what for what, patterns in _TRAINING.items() if any(any(folder.glob(one)) for one in patterns)}
    if there and len(there) < len(_TRAINING) and not any(folder.glob("global_step*")):  # DeepSpeed has files of its own
        return f"has no {next(what for what in _TRAINING if what not in there)} beside the rest of its state"
    for config in folder.glob("**/adapter_config.json"):
        if not any((config.parent / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
            return f"has no {(config.parent / 'adapter_model.safetensors').relative_to(folder)}"
    for shards in {file.parent for file in folder.glob("*/*.distcp")}:
        # A pickle, whose text is looked through; it is not unpickled.
        content = (shards / _METADATA).read_bytes() if (shards / _METADATA).is_file() else b""
        if not content.endswith(b"."):  # the last byte of every pickle
            return f"has no whole {shards.name}/{_METADATA}"
        for name in sorted({found.decode() for found in _SHARD.findall(content)}):
            if not (shards / name).is_file():
                return f"has no {shards.name}/{name}"
    return None


def _cut_file(folder: Path) -> str | None:
    for config in folder.glob("**/adapter_config.json"):
        if not _is_json(config):
            return f"has an {config.relative_to(folder)} that is not whole"
    for pattern in _WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            try:
                check_file_length(file)
            except ValueError as error:
                return f"is damaged: {str(error).partition('. ')[0]}"
    for pattern in _ARCHIVES:
        for file in sorted(folder.glob(pattern)):
            if _is_cut_off(file):
                return f"has its {file.relative_to(folder)} cut off"
    return None


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _is_cut_off(file: Path) -> bool:
    """Whether the end of what `torch.save` wrote is missing; a shard is several such archives one after the other."""
    with file.open("rb") as stream:
        start = stream.read(2)
        if start != b"PK":  # older formats have no mark at their end
            return not start
        stream.seek(-min(len(_ZIP_END) + 18, file.stat().st_size), 2)
        return not stream.read().startswith(_ZIP_END)


def checkpoints_of(folder: Path) -> list[Path]:
    """Folders `checkpoint-<step>` in it, the newest step first."""
    found = [entry for entry in folder.glob("checkpoint-*") if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=_step, reverse=True)


def whole_checkpoint(
    resume: str | bool | None, output_dir: str, device: torch.device | str = "cpu"
) -> str | bool | None:
    """What to resume from in place of `resume_from_checkpoint`: with True, the newest checkpoint that is whole, with a
    warning where a newer one is not. Of several processes, all look, and all take the newest that every one finds
    whole; `device` is where their collectives run.

    Raises:
        ValueError: with True, no checkpoint of `output_dir` is whole; with a folder, that one is not. Names it, and the
            newest before it that is. On every rank alike.
    """
    if not resume:
        return resume
    if resume is not True and not Path(resume).is_dir():
        return resume  # Trainer says so
    if resume is not True:
        return _whole_folder(Path(resume), device)
    found = checkpoints_of(Path(output_dir))
    whole = [one for one in found if why_torn(one) is None]
    newest = _newest_of_all_ranks([_step(one) for one in whole], device)
    chosen = next((one for one in whole if _step(one) == newest), None)
    if chosen is None and not found:
        raise ValueError(
            f"No valid checkpoint found in output directory ({output_dir}): there is none. Train from the start "
            "(resume_from_checkpoint=None)."
        )
    if chosen is None:
        raise ValueError(f"{_described(found[0])} {_NONE_BEFORE}")
    if chosen != found[0]:
        warnings.warn(
            f"{_described(found[0])} Training goes on from '{chosen}', the newest before it that is whole, and writes "
            "the other anew when it gets there.",
            stacklevel=3,
        )
    return str(chosen)


def _whole_folder(folder: Path, device: torch.device | str) -> str:
    torn = why_torn(folder)
    alike = _steps_of_ranks(int(torn is None), device)
    if min(alike) == 1:
        return str(folder)
    siblings = checkpoints_of(folder.parent) if _NAME.fullmatch(folder.name) else []
    whole = [_step(one) for one in siblings if _step(one) < _step(folder) and why_torn(one) is None]
    newest = _newest_of_all_ranks(whole, device)
    before = next((one for one in siblings if _step(one) == newest), None)
    if before is None:
        raise ValueError(f"{_described(folder)} {_NONE_BEFORE}")
    raise ValueError(f"{_described(folder)} The newest before it that is whole is '{before}': resume from that.")


def _described(folder: Path) -> str:
    torn = why_torn(folder) or "is not whole, or not there, on another rank"
    return f"The checkpoint '{folder}' {torn}: a process ended while it was written, or its disk lost a part."


def _newest_of_all_ranks(steps: list[int], device: torch.device | str) -> int | None:
    """The largest step that is among the `steps` of every rank."""
    bound = max(steps, default=-1)
    while True:
        mine = max((step for step in steps if step <= bound), default=-1)
        found = _steps_of_ranks(mine, device)
        if min(found) == max(found) or min(found) < 0:
            return found[0] if min(found) >= 0 else None
        bound = min(found)


def _steps_of_ranks(step: int, device: torch.device | str) -> list[int]:
    steps = torch.zeros(world_size(), dtype=torch.long, device=device)
    steps[rank()] = step
    return all_reduce_sum(steps).tolist()


def guard_checkpoints() -> None:
    """Let `Trainer.train` look at a checkpoint before it loads from it (`whole_checkpoint`).

    A checkpoint that is there already, and is written again, loses its `trainer_state.json` first, so that a kill
    leaves no mixture of two runs that seems whole; of several processes, that file is written when all have written
    theirs. A run that is resumed behind its last step trains no further one, as Trainer does where that step lies
    within an epoch. For runs with an adapter or a rule of this package; does nothing the second time.
    """
    original, save, save_random = Trainer.train, Trainer._save_checkpoint, Trainer._save_rng_state
    if getattr(save, "_begins_anew", False):
        return

    @functools.wraps(original)
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self):
            resume_from_checkpoint = whole_checkpoint(resume_from_checkpoint, self.args.output_dir, self.args.device)
            _allocate_passing(self, resume_from_checkpoint)
        return original(self, resume_from_checkpoint, *args, **kwargs)

    @functools.wraps(save)
    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(self):
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
                (folder / STATE).unlink(missing_ok=True)
            _wait_for_ranks(self)
        return save(self, model, trial, *args, **kwargs)

    @functools.wraps(save_random)
    def _save_rng_state(self, *args: Any, **kwargs: Any) -> None:
        # Each rank writes its own; the first, which goes on to say that all is whole, may be ahead of the others.
        save_random(self, *args, **kwargs)
        if _is_ours(self):
            _wait_for_ranks(self)

    _save_checkpoint._begins_anew = True
    _end_at_the_last_step()
    Trainer.train, Trainer._save_checkpoint, Trainer._save_rng_state = train, _save_checkpoint, _save_rng_state


def _wait_for_ranks(trainer: Trainer) -> None:
    if world_size() > 1:
        all_reduce_sum(torch.zeros(1, device=trainer.args.device)).item()


def _allocate_passing(trainer: Trainer, resume: str | bool | None) -> None:
    """Before FSDP2's state dicts are read into the tensors that the model has: those that it has at some steps only."""
    runners = [one for one in trainer.callback_handler.callbacks if isinstance(one, RuleRunner)]
    if not runners or not resume or (sharding_switched_on(trainer.args) or ("",))[0] != "FSDP2":
        return
    state = Path(str(resume)) / STATE
    if not state.is_file():
        return  # Trainer says so
    callbacks = json.loads(state.read_text(encoding="utf-8")).get("stateful_callbacks") or {}
    for runner in runners:
        found = callbacks.get(type(runner).__name__, [])
        for one in found if isinstance(found, list) else [found]:
            runner.allocate_passing(trainer.model, one.get("attributes", {}).get("restored", {}))


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
