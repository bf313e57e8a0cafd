"""The loss of a second data set beside that of the training data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed
from transformers.utils import ModelOutput

from ...rules import Run
from ...rules.calibration_data import CalibrationData, endless
from ...rules.probing import loss_of, random_state, random_state_kept, set_random_state
from ...sparsity import stream_seed
from ...tuners.shared.live_run import current_trainer


class TransferBatches:
    """The batches of a second data set over and over, in an order of their own: they draw from random states that
    training does not see, and after `read` batches they are those of a run that read so many.

    Raises:
        TypeError: data that cannot be read again from its start (`CalibrationData`).
        ValueError: no batch.
    """

    def __init__(self, data: Iterable[Mapping[str, Any]], device: torch.device, seed: int, read: int = 0) -> None:
        with random_state_kept():
            set_seed(stream_seed(seed, "transfer batches") % 2**32)
            self._batches = endless(CalibrationData(data, device), device)
            self._state = random_state()
        self.read = 0
        for _ in range(read):
            next(self)

    def __next__(self) -> dict[str, Any]:
        with random_state_kept():
            set_random_state(self._state)
            batch = next(self._batches)
            self._state = random_state()
        self.read += 1
        return batch


class TransferLoss:
    r"""Adds :math:`\lambda L_{transfer}` to the loss of every training pass, a batch of the second data set each.

    Both losses are means, and so are their sums over the micro-batches of a step and over ranks. The second pass goes
    through the same model, heads and masks included, before the backward pass of both.
    """

    def __init__(self, run: Run, weight: float, batches: TransferBatches) -> None:
        self._run, self._weight, self.batches = run, weight, batches

    @contextmanager
    def added(self) -> Iterator[None]:
        """Inside, training passes have it."""
        handle = self._run.model.register_forward_hook(self._add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not model.training or not torch.is_grad_enabled():
            return None
        loss = getattr(output, "loss", None)
        if not isinstance(output, ModelOutput) or loss is None:
            raise ValueError(
                "The transfer loss is added to the model's own, and its output has none. Give batches labels, and "
                "train without compute_loss_func, label_smoothing_factor and return_dict=False."
            )
        second: Tensor = loss_of(model.forward, next(self.batches))  # not by hooks: this one would run again
        output.loss = loss + self._weight * self._share(kwargs.get("num_items_in_batch")) * second.to(loss)
        return output

    def _share(self, items: Any) -> float:
        """What a micro-batch's mean counts in the step's: Trainer divides the loss by the micro-batches itself where
        the model has not divided it by all their labels, and then multiplies it by the ranks."""
        if items is None:
            return 1.0
        training = self._run.training
        micro_batches = getattr(current_trainer(), "current_gradient_accumulation_steps", training.accumulation)
        shared = getattr(training.arguments, "average_tokens_across_devices", False)
        return 1.0 / (micro_batches * (self._run.world if shared else 1))
