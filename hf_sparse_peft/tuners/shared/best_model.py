"""`load_best_model_at_end` and adapters that are not called 'default', which Trainer does not bring back."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from transformers import TrainingArguments

from .live_run import current_trainer


def warn_within_trainer(model: nn.Module) -> None:
    """`warn_of_best_model` for the Trainer whose step calls this; nothing elsewhere. For runs without our callbacks."""
    trainer = current_trainer()
    if trainer is not None:
        warn_of_best_model(trainer.args, trainer.state, model)


def warn_of_best_model(args: TrainingArguments, state: Any, model: nn.Module) -> None:
    """Say, once a run, that `load_best_model_at_end` will not bring the best state of these adapters back."""
    if not getattr(args, "load_best_model_at_end", False) or getattr(state, "_best_model_told", False):
        return
    layers = [module for module in model.modules() if hasattr(module, "ran_in_training")]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    if active in ([], ["default"]):
        return
    state._best_model_told = True
    lost = active if active[0] != "default" else active[1:]
    warnings.warn(
        f"load_best_model_at_end: Trainer loads the best checkpoint of an adapter called 'default' only, and "
        f"{lost} will keep the values of the last step (or get those of another adapter). Name the adapter 'default', "
        f"train one at a time, or load it yourself after training: model.load_adapter(os.path.join("
        f"trainer.state.best_model_checkpoint, '{lost[0]}'), '{lost[0]}').",
        stacklevel=3,
    )
