"""`SupportSearchCallback`: the best of some random supports, at the start of training."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..rules.collectives import all_reduce_mean
from ..rules.probing import loss_of, modes_kept, random_state_kept
from ..sparsity import random_units, stream_seed
from ..tuners import SparseLoraConfig
from .base import AdaptedLayer, ScheduleCallback
from .calibration_data import CalibrationData, items_in

logger = logging.get_logger(__name__)

Batch = list[dict[str, Any]]
"""The micro-batches of one optimizer step."""


class SupportSearchCallback(ScheduleCallback):
    """Tries `support_search.trials` random supports before the first step and keeps the one whose short training ends
    with the smallest loss.

    Draws follow from the config's seed, the trial and the module's name. Batches are read through copies of the
    Trainer's sampler and random states, so that training sees the batches that it would have seen; the model runs in
    evaluation mode. Of the adapter only the support's values train, and they are put back; nothing else of model or
    optimizer changes. Under DDP losses and gradients are averaged over ranks and all keep the same support. A resumed
    run finds its support in the checkpoint and does not search again.

    Costs `trials * (steps` forwards and backwards `+ batches` forwards `)`.
    """

    option = "support_search"

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        """Mean loss of each trial after its steps."""
        self.best: int | None = None
        """The trial that was kept."""

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        """Search, unless the run is resumed.

        Raises:
            ValueError: no dataloader or no batch, values that were trained already, or a loss that is never finite.
        """
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if state.global_step:
            return
        if train_dataloader is None:
            raise ValueError(
                "support_search tries supports on the training data, and this trainer hands its callbacks no "
                "dataloader. Train with transformers' Trainer, or set support_search=None."
            )
        self.losses, self.best = [], None
        with random_state_kept(), modes_kept(model, training=False):
            data = CalibrationData(train_dataloader, next(model.parameters()).device)
            for config in self.configs():
                parts = [part for part in self.parts if part.config is config]
                _check_fresh(parts)
                size, count = args.gradient_accumulation_steps, config.support_search.batches
                micro = list(itertools.islice(data.batches(), size * count))
                batches = [micro[begin : begin + size] for begin in range(0, len(micro), size)]
                if not batches:
                    raise ValueError("support_search found no batch in the train dataloader. Give the Trainer data.")
                lr = config.support_search.lr or args.learning_rate
                show = not args.disable_tqdm and state.is_world_process_zero
                self._search(model, config, parts, batches, lr, show)

    def _search(
        self,
        model: nn.Module,
        config: SparseLoraConfig,
        parts: list[AdaptedLayer],
        batches: list[Batch],
        lr: float,
        show: bool,
    ) -> None:
        search = config.support_search
        losses, own = [], [part.units.clone() for part in parts]
        try:
            for trial in tqdm(range(search.trials), desc="Searching supports", disable=not show, delay=1):
                if trial:  # the first is the adapter's own
                    _write(parts, [trial_units(part, trial) for part in parts])
                losses.append(probe(model, parts, batches, search.steps, lr))
        finally:  # an exception, Ctrl-C included, leaves the adapter with its own support
            _write(parts, own)
        finite = [loss if math.isfinite(loss) else float("inf") for loss in losses]
        best = min(range(len(finite)), key=finite.__getitem__)
        if finite[best] == float("inf"):
            raise ValueError(
                f"support_search: the loss of all {search.trials} trials is not finite after {search.steps} steps at "
                f"lr={lr:g}. Set support_search.lr lower, and check that no batch has all its labels masked (-100)."
            )
        if best:
            _write(parts, [trial_units(part, best) for part in parts])
        self.losses, self.best = losses, best
        logger.info(f"Support search: trial {best} of {search.trials} kept, losses {losses}.")


def trial_units(part: AdaptedLayer, trial: int) -> torch.Tensor:
    """The random support of a trial, as many units as live in the adapter's own."""
    grid = part.layer.sparse_lora_grid[part.adapter]
    seed = stream_seed(part.config.seed, "support_search", trial, part.name)
    units = random_units(grid.num_units, part.units.numel(), torch.Generator().manual_seed(seed))
    return units.to(part.units.device)


def probe(model: nn.Module, parts: list[AdaptedLayer], batches: list[Batch], steps: int, lr: float) -> float:
    """Mean loss on `batches` after `steps` steps of Adam on the supports' values, which are then put back.

    Gradients are asked for by name: no `.grad` is touched, and no hook of a wrapper sees them.
    """
    values = [part.values for part in parts]
    start = [value.detach().clone() for value in values]
    optimizer = torch.optim.Adam(values, lr=lr)
    try:
        with torch.enable_grad():
            for step in range(steps):
                optimizer.zero_grad()
                for share, micro in _shares(batches[step % len(batches)], model):
                    gradients = torch.autograd.grad(share * loss_of(model, micro), values)
                    for value, gradient in zip(values, gradients, strict=True):
                        value.grad = gradient if value.grad is None else value.grad.add_(gradient)
                for value in values:
                    all_reduce_mean(value.grad)
                optimizer.step()
        with torch.no_grad():
            losses = [
                sum(share * loss_of(model, micro).float() for share, micro in _shares(batch, model))
                for batch in batches
            ]
        return float(all_reduce_mean(torch.stack(losses).mean()))
    finally:
        for value, before in zip(values, start, strict=True):
            value.data.copy_(before)
            value.grad = None


def _shares(batch: Batch, model: nn.Module) -> list[tuple[float, dict[str, Any]]]:
    """The micro-batches of one step, each with its share of what the step's loss is a mean of."""
    items = [items_in(micro, model) for micro in batch]
    return [(count / sum(items), micro) for count, micro in zip(items, batch, strict=True)]


def _write(parts: list[AdaptedLayer], supports: list[torch.Tensor]) -> None:
    for part, units in zip(parts, supports, strict=True):
        part.layer.write_support(part.adapter, units)


def _check_fresh(parts: list[AdaptedLayer]) -> None:
    for part in parts:
        if not part.layer.has_first_values(part.adapter):
            raise ValueError(
                f"support_search would put another support under the trained values of '{part.name}'. Set "
                "support_search=None in the config of an adapter that goes on training."
            )
