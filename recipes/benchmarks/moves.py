"""A short run whose support moves, under Trainer, and the same run resumed from its middle: do they end alike?"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import LivingUnits, make_trainer, training_arguments
from llama import PRESETS, Preset, adapt, build_base, share
from peft import PeftModel
from step_cost import MOVING, RANK
from torch import nn
from transformers import TrainerCallback, default_data_collator, set_seed

TINY = Preset(1, 64, 192, 2, 1, 512, 1, 16)
BIT_EQUAL_ON = ("cpu",)
"""Where sums have one order: on a GPU cuBLAS and atomic additions may choose another one every time."""
TOLERANCE = 1e-2
"""Largest difference of a trained number, over the largest trained number of its tensor, where bits may differ."""


class _Options:
    """What `training_arguments` reads."""

    def __init__(self, steps: int, device: str):
        self.steps, self.device = steps, device


class _Watch(TrainerCallback):
    """Counts moves, and times steps."""

    def __init__(self, model: nn.Module):
        self.moves, self._units, self._start = [], LivingUnits(model), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._units.moved():
            self.moves.append(state.global_step)

    def seconds(self) -> float:
        return time.perf_counter() - self._start


def run_with_moves(device: str, base_name: str, candidate: str, tiny: bool) -> dict[str, Any]:
    """Figures of both runs; `wrong` says what is not as it should be."""
    preset, half = (TINY, 4) if tiny else (PRESETS["cpu"], 12)
    base = build_base(preset, base_name, device)
    ids = torch.randint(preset.vocab, (8, preset.tokens), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    moving = MOVING + candidate.removeprefix("shira:")
    with tempfile.TemporaryDirectory() as folder:
        whole, watch = _train(base, moving, data, Path(folder), device, 2 * half, save=half)
        seconds = watch.seconds()
        resumed, again = _train(base, moving, data, Path(folder), device, 2 * half, resume=half)
    supports_equal = _same_units(whole, resumed)
    difference = _difference(whole, resumed)
    late = [step for step in watch.moves if step > half]
    wrong = [] if supports_equal and late == again.moves else ["supports of the resumed run are others"]
    wrong += [] if late and len(late) < len(watch.moves) else ["no move before and after the checkpoint"]
    wrong += (
        [] if difference <= (0.0 if device in BIT_EQUAL_ON else TOLERANCE) else [f"values differ by {difference:.0e}"]
    )
    found = {
        "moves": len(watch.moves),
        "late_moves": len(late),
        "supports_equal": supports_equal,
        "difference": difference,
    }
    found |= {"bit_equal": difference == 0, "milliseconds": 1e3 * seconds / (2 * half)}
    return {**found, "wrong": wrong} if wrong else found


def _train(
    base: nn.Module, candidate: str, data: list, folder: Path, device: str, steps: int, save: int = 0, resume: int = 0
) -> tuple[PeftModel, _Watch]:
    set_seed(0)
    model, method = adapt(share(base), candidate, RANK)
    saving = {"save_strategy": "steps", "save_steps": save} if save else {}
    args = training_arguments(_Options(steps, device), folder, 1e-3, 0, per_device_train_batch_size=2, **saving)
    watch = _Watch(model)
    trainer = make_trainer(method, model, args, [watch], train_dataset=data, data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return model, watch


def _same_units(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(LivingUnits(one).seen, LivingUnits(other).seen, strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def _difference(one: nn.Module, other: nn.Module) -> float:
    pairs = [(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True) if a.requires_grad]
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in pairs)
