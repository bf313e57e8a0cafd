"""The table of methods by name: what a paper's method is made of, and where it comes from."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..hub.analysis.checkpoints import Checkpoint
from ..optim import AgedAdamW, aged_adamw_groups
from ..training import callbacks_for

OptimizerFactory = Callable[[nn.Module, TrainingArguments], torch.optim.Optimizer]
CallbackFactory = Callable[[nn.Module], list[TrainerCallback]]
FirstRun = Callable[[], tuple[Checkpoint, Checkpoint]]
Preparation = Callable[[nn.Module, FirstRun | None], None]


@dataclass(frozen=True)
class MethodInfo:
    """What the registry tells about a method before it is built."""

    name: str
    paper: str
    """Authors and year of the source."""
    moves: str
    """What changes shape or place during training."""
    use_when: str
    """One line: when to reach for it."""
    cost: str
    """One line: what it costs beyond a plain adapter."""
    build: Callable[..., Method] = field(repr=False)


@dataclass(frozen=True)
class Method:
    """A method ready to train: `get_peft_model(model, method.config)`, then a Trainer with callbacks and optimizer."""

    config: PeftConfig
    make_optimizer: OptimizerFactory | None = None
    trainer_class: type[Trainer] = Trainer
    make_callbacks: CallbackFactory = callbacks_for
    """Most methods say everything in their config; one over upstream's configs brings its own callbacks here."""
    make_ready: Preparation | None = None
    """What must be done to the adapted model before there is a Trainer, where a method asks for it; see `prepare`."""
    info: MethodInfo | None = None

    @property
    def paper(self) -> str:
        """Authors and year of the source."""
        return self.info.paper if self.info else ""

    def prepare(self, model: nn.Module, first_run: FirstRun | None = None) -> None:
        """What the method needs between `get_peft_model` and the Trainer: nothing, but where it learns from a run.

        `first_run()` trains the whole base without an adapter and gives its weights before and after, as folders,
        safetensors files, state dicts or models. Only methods that learn from such a run call it.

        Raises:
            ValueError: the method needs a run and got none; says what to pass.
        """
        if self.make_ready is not None:
            self.make_ready(model, first_run)

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        """The callbacks that this method needs on `model`, an empty list for methods that only choose a support."""
        return self.make_callbacks(model)

    def optimizer(self, model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer | None:
        """The optimizer that the paper asks for, for `Trainer(optimizers=(optimizer, None))`; None: Trainer's own."""
        return None if self.make_optimizer is None else self.make_optimizer(model, args)


_METHODS: dict[str, MethodInfo] = {}


def register(name: str, *, paper: str, moves: str, use_when: str, cost: str):
    """Decorator: enter a function that builds a `Method` under `name`; its keyword arguments are the method's options.

    Raises:
        ValueError: the name is taken or is not lower case with dashes.
    """
    if name in _METHODS:
        raise ValueError(f"method name {name!r} is taken by {_METHODS[name].build.__module__}; choose another.")
    if name != name.lower() or "_" in name or " " in name:
        raise ValueError(f"method name {name!r} must be lower case with dashes, as in 'spiel-ag'.")

    def enter(build: Callable[..., Method]) -> Callable[..., Method]:
        @functools.wraps(build)
        def with_info(**options: Any) -> Method:
            return replace(build(**options), info=_METHODS[name])

        _METHODS[name] = MethodInfo(name, paper, moves, use_when, cost, with_info)
        return with_info

    return enter


def get(name: str, **options: Any) -> Method:
    """Build the method `name`; `options` are its own and, behind them, any field of its config.

    Raises:
        ValueError: no such method (the message lists them), or an option that neither method nor config has.
    """
    if name not in _METHODS:
        raise ValueError(f"method {name!r} is unknown; choose one of {names()}.")
    try:
        return _METHODS[name].build(**options)
    except TypeError as error:
        accepted = [
            p.name for p in inspect.signature(_METHODS[name].build).parameters.values() if p.kind != p.VAR_KEYWORD
        ]
        raise ValueError(
            f"method {name!r} does not take one of {sorted(options)}: {error}. It takes {accepted} and the "
            "fields of its config."
        ) from error


def names() -> list[str]:
    """All method names, sorted."""
    return sorted(_METHODS)


def describe(name: str) -> MethodInfo:
    """The registry's entry of one method."""
    get_known = _METHODS.get(name)
    if get_known is None:
        raise ValueError(f"method {name!r} is unknown; choose one of {names()}.")
    return get_known


def markdown_table() -> str:
    """The methods as the table that README shows."""
    lines = ["| method | source | what moves | use it when | cost |", "|---|---|---|---|---|"]
    lines += [f"| `{i.name}` | {i.paper} | {i.moves} | {i.use_when} | {i.cost} |" for _, i in sorted(_METHODS.items())]
    return "\n".join(lines)


def aged_adamw(model: nn.Module, args: TrainingArguments, values_ratio: float = 1.0) -> AgedAdamW:
    """AdamW with an age per unit of the supports, from the Trainer's own arguments; values of supports learn at
    `values_ratio` times the learning rate of everything else (as LoRA+ does for B; Hayou et al., 2024).

    Raises:
        ValueError: `values_ratio` is not above 0.
    """
    if not values_ratio > 0:
        raise ValueError(f"values_ratio={values_ratio} is not a ratio of learning rates; give a number above 0.")
    groups = aged_adamw_groups(model, lambda name, _: "sparse_lora_values" in name, args.weight_decay)
    for group in groups:
        group["lr"] = args.learning_rate * (values_ratio if group["per_unit_age"] else 1.0)
    return AgedAdamW(groups, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)
