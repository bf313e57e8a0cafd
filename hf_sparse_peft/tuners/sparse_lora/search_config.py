"""How random supports are tried before training, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from ...utils.option_types import check_types
from .schedule_config import require


@dataclass
class SupportSearchConfig:
    """Random supports tried before the first step, the best one kept: the neutral baseline for criteria that choose.

    Each trial trains its own draw for a few steps of Adam on the same batches, from the adapter's start, and is judged
    by the mean loss on these batches afterwards. Nothing of a trial stays but its support."""

    trials: int = 8
    """Supports tried; the first is the one the adapter was made with, so a search never does worse than none on its
    batches."""
    steps: int = 4
    """Optimizer steps a trial trains; step i sees batch i, and the first one again after the last."""
    batches: int = 4
    """The batches of the Trainer's first optimizer steps, that all trials train on and are judged by."""
    lr: float | None = None
    """Learning rate of the trials; None: the run's own."""

    def __post_init__(self) -> None:
        check_types(self)
        name = "SupportSearchConfig"
        require(self.trials >= 2, name, "trials", self.trials, "an integer >= 2; one draw needs no search")
        require(self.steps >= 1, name, "steps", self.steps, "an integer >= 1")
        require(self.batches >= 1, name, "batches", self.batches, "an integer >= 1")
        require(self.lr is None or self.lr > 0, name, "lr", self.lr, "None (the run's own) or a number > 0")
