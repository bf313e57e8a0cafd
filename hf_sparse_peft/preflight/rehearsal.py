"""The beginning of a run, without weights and data: rules find their units, and say what does not fit the run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..rules import Training
from ..training import TRAINERS, trainer_class_for
from ..training.executor import RuleExecutor
from .meta_answers import MetaAnswers


class Rehearsal(RuleExecutor):
    """Begins the rules of a model on the meta device one by one."""

    def messages(self, training: Training) -> Iterator[tuple[str, str, Exception | None]]:
        """Of each rule that refuses the run or warns of it: its name, what it says, and the error, None for a warning.

        A rule that first looks at data is left out.
        """
        self.training = training
        self._join(training.model, None)
        try:
            for run in self._make_runs():
                name = type(run.rule).__name__
                if "batches" in run.rule.all_needs:
                    continue
                with warnings.catch_warnings(record=True) as caught, MetaAnswers():
                    warnings.simplefilter("always")
                    try:
                        run.begin()
                    except (ValueError, NotImplementedError, RuntimeError) as error:
                        yield name, str(error), error
                yield from ((name, str(one.message), None) for one in caught if one.category is UserWarning)
        finally:
            self.leave()


def rehearse(
    model: nn.Module, config: Any, optimizer: Any, arguments: TrainingArguments | None, steps: int
) -> list[tuple[str, str, Exception | None]]:
    """What the rules of an adapter on the meta device say of a run of `steps`; see `Rehearsal.messages`.

    Raises:
        ValueError: rules of the config cannot run here, or not in this run.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer is None and trained:
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
    provided = {need for need, cls in TRAINERS.items() if cls is trainer_class_for(config)}
    training = Training(model, steps, optimizer=optimizer, arguments=arguments, provides=frozenset(provided))
    if arguments is not None:
        training.accumulation = arguments.gradient_accumulation_steps
        training.learning_rate = arguments.learning_rate
        training.warmup_steps = arguments.get_warmup_steps(steps)
        training.clips, training.fp16 = bool(arguments.max_grad_norm), bool(arguments.fp16)
    return list(Rehearsal(owner="doctor").messages(training))
