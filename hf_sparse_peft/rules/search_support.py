"""`SearchSupport`: the best of some random supports, at the start of training."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..sparsity import random_units, stream_seed
from ..utils.option_types import PositiveFloat, PositiveInt, Range
from ..utils.parts import register_part
from .calibration_data import CalibrationData, items_in
from .collectives import all_reduce_mean
from .probing import loss_of, modes_kept, random_state_kept
from .rule import Rule
from .run import Run
from .space import UnitSpace

logger = logging.get_logger(__name__)

Batch = list[dict[str, Any]]
"""The micro-batches of one optimizer step."""


@register_part("search_support")
@dataclass(frozen=True)
class SearchSupport(Rule):
    """Random search (Bergstra and Bengio, 2012): tries random supports before the first step and keeps the one whose
    short training ends with the smallest loss; the neutral baseline for criteria that choose.

    Each trial trains its own draw for some steps of Adam on the same batches, from the adapter's start, and is judged
    by the mean loss on these batches afterwards. Draws follow from the config's seed, the trial and the module's name.
    Batches are read through copies of the sampler and random states, so that training sees the batches that it would
    have seen; the model runs in evaluation mode. Of the adapter only the support's values train, and they are put back;
    nothing else of model or optimizer changes. Under DDP losses and gradients are averaged over ranks and all keep the
    same support. A resumed run finds its support in the checkpoint and does not search again.

    Costs `trials * (steps` forwards and backwards `+ batches` forwards `)`. The one event that it records has the mean
    `losses` of the trials and which one is `kept`.
    """

    trials: Annotated[int, Range(least=2)] = 8
    """Supports tried; the first is the one the adapter was made with, so a search never does worse than none on its
    batches."""
    steps: PositiveInt = 4
    """Optimizer steps a trial trains; step i sees batch i, and the first one again after the last."""
    batches: PositiveInt = 4
    """The batches of the run's first optimizer steps, that all trials train on and are judged by."""
    lr: PositiveFloat | None = None
    """Learning rate of the trials; None: the run's own."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support"})
    # Units change before the first step alone, where no other rule has looked at them: it writes none in the run.
    writes: ClassVar[frozenset[str]] = frozenset()
    needs: ClassVar[frozenset[str]] = frozenset({"batches"})

    def check(self, config: Any) -> None:
        """Refuse a support that is no random draw, or that is thrown away at the first move."""
        if not config.has_support or config.criterion.part_type != "random" or config.structures:
            raise ValueError(
                f"SearchSupport tries random supports; got criterion='{config.criterion.part_type}', density="
                f"{config.density} and {len(config.structures)} structures. Set criterion='random', density > 0 and "
                "structures=[]."
            )
        if any(getattr(rule, "replace_all_first", None) for rule in config.rules):
            raise ValueError(
                "SearchSupport finds a support that Regrow.replace_all_first=True would throw away at the first move. "
                "Set replace_all_first=False, or leave SearchSupport out."
            )

    def begin(self, run: Run) -> None:
        """Search, unless the run is resumed.

        Raises:
            ValueError: no dataloader or no batch, values that were trained already, or a loss that is never finite.
        """
        if run.resumed:
            return
        training, spaces = run.training, run.spaces()
        if training.dataloader is None:
            raise ValueError(
                "SearchSupport tries supports on the training data, and this loop hands its rules no dataloader. Train "
                "with transformers' Trainer, pass Controller(dataloader=...), or leave SearchSupport out."
            )
        _check_fresh(spaces)
        with random_state_kept(), modes_kept(run.model, training=False):
            data = CalibrationData(training.dataloader, next(run.model.parameters()).device)
            size = training.accumulation
            micro = list(itertools.islice(data.batches(), size * self.batches))
            batches = [micro[begin : begin + size] for begin in range(0, len(micro), size)]
            if not batches:
                raise ValueError("SearchSupport found no batch in the training data. Give the loop data.")
            self._search(run, spaces, batches, self.lr or training.learning_rate)

    def _search(self, run: Run, spaces: list[UnitSpace], batches: list[Batch], lr: float) -> None:
        losses, own = [], [space.alive().clone() for space in spaces]
        hidden = not run.training.show_progress
        try:
            for trial in tqdm(range(self.trials), desc="Searching supports", disable=hidden, delay=1):
                if trial:  # the first is the adapter's own
                    _write(spaces, [trial_units(space, trial) for space in spaces])
                losses.append(probe(run.model, spaces, batches, self.steps, lr))
        finally:  # an exception, Ctrl-C included, leaves the adapter with its own support
            _write(spaces, own)
        finite = [loss if math.isfinite(loss) else float("inf") for loss in losses]
        best = min(range(len(finite)), key=finite.__getitem__)
        if finite[best] == float("inf"):
            raise ValueError(
                f"SearchSupport: the loss of all {self.trials} trials is not finite after {self.steps} steps at "
                f"lr={lr:g}. Set SearchSupport.lr lower, and check that no batch has all its labels masked (-100)."
            )
        if best:
            _write(spaces, [trial_units(space, best) for space in spaces])
        run.record(kept=best, losses=losses)
        logger.info(f"Support search: trial {best} of {self.trials} kept, losses {losses}.")


def trial_units(space: UnitSpace, trial: int) -> Tensor:
    """The random support of a trial, as many units as live in the adapter's own."""
    own = space.alive()
    seed = stream_seed(space.seed, "support_search", trial, space.name)
    drawn = torch.Generator().manual_seed(seed)
    if space.pattern is not None:
        return space.pattern.random_region(space.grid, seed).random_units(own.numel(), drawn).to(own.device)
    return random_units(space.size, own.numel(), drawn).to(own.device)


def probe(model: nn.Module, spaces: list[UnitSpace], batches: list[Batch], steps: int, lr: float) -> float:
    """Mean loss on `batches` after `steps` steps of Adam on the parameters of `spaces`, which are then put back.

    Gradients are asked for by name: no `.grad` is touched, and no hook of a wrapper sees them.
    """
    values = [parameter for space in spaces for parameter in space.parameters()]
    start = [value.detach().clone() for value in values]
    optimizer = torch.optim.Adam(values, lr=lr)
    try:
        with torch.enable_grad():
            for step in range(steps):
                optimizer.zero_grad()
                for weight, micro in _weighted(batches[step % len(batches)], model):
                    gradients = torch.autograd.grad(weight * loss_of(model, micro), values)
                    for value, gradient in zip(values, gradients, strict=True):
                        value.grad = gradient if value.grad is None else value.grad.add_(gradient)
                for value in values:
                    all_reduce_mean(value.grad)
                optimizer.step()
        with torch.no_grad():
            losses = [
                sum(weight * loss_of(model, micro).float() for weight, micro in _weighted(batch, model))
                for batch in batches
            ]
        return float(all_reduce_mean(torch.stack(losses).mean()))
    finally:
        for value, before in zip(values, start, strict=True):
            value.data.copy_(before)
            value.grad = None


def _weighted(batch: Batch, model: nn.Module) -> list[tuple[float, dict[str, Any]]]:
    """The micro-batches of one step, each with its weight in the mean that the step's loss is."""
    items = [items_in(micro, model) for micro in batch]
    return [(count / sum(items), micro) for count, micro in zip(items, batch, strict=True)]


def _write(spaces: list[UnitSpace], supports: list[Tensor]) -> None:
    for space, units in zip(spaces, supports, strict=True):
        space.write(units)


def _check_fresh(spaces: list[UnitSpace]) -> None:
    for space in spaces:
        if not space.has_first_values():
            raise ValueError(
                f"SearchSupport would put another support under the trained values of '{space.name}'. Leave it out of "
                "the schedule of an adapter that goes on training."
            )
