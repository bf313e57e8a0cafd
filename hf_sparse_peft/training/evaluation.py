"""The loss that a Trainer evaluates, for rules that look at it between two steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from ..rules.collectives import all_reduce_sum


def evaluation_of(trainer: Trainer | None) -> Callable[[nn.Module], float] | None:
    """A function that gives the mean loss of the model on the Trainer's `eval_dataset`, without logs, metrics or
    callbacks; None where there is no Trainer or not exactly one such dataset."""
    data = getattr(trainer, "eval_dataset", None)
    if data is None or isinstance(data, dict):
        return None

    def evaluate(model: nn.Module) -> float:
        total = torch.zeros(2, dtype=torch.float64, device=trainer.args.device)
        for batch in trainer.get_eval_dataloader():
            loss = trainer.prediction_step(model, batch, prediction_loss_only=True)[0]
            if loss is None:
                raise ValueError("The Trainer evaluates no loss: its eval_dataset has no labels. Add them.")
            size = find_batch_size(batch) or 1
            total += torch.stack([loss.double().mean() * size, torch.tensor(float(size), device=loss.device)])
        total = all_reduce_sum(total)
        return float(total[0] / total[1])

    return evaluate
