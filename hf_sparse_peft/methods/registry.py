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
from ..training import callbacks_for, make_optimizer, trainer_class_for
from ..tuners import SparseLoraConfig
from .functions import how_to_call

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
    upstream: str | None = None
    """The config class of upstream peft that the method is, where it is one of upstream's."""
    claim: str | None = None
    """What its authors claim, with where they do; nothing of it was measured here."""
    four_bit: bool = True
    """Whether it trains on 4-bit bases; where not, `cost` says so too."""
    changes_base: bool = False
    """Whether it leaves another base beside its adapter, which is to be saved too."""
    keeps_places: bool = False
    """Whether it stands where its paper has it, also in runs whose other methods take all linear layers."""


@dataclass(frozen=True)
class Method:
    """A method ready to train: `get_peft_model(model, method.config)`, then a Trainer with callbacks and optimizer.

    Callbacks, optimizer and the Trainer's class follow from the config, as `trainer_options` gives them.
    """

    config: PeftConfig
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
        return make_optimizer(model, args)

    @property
    def trainer_class(self) -> type[Trainer]:
        """`Trainer`, or the class of this package that the method needs."""
        return trainer_class_for(self.config)


_METHODS: dict[str, MethodInfo] = {}


def register(
    name: str,
    *,
    paper: str,
    moves: str,
    use_when: str,
    cost: str,
    upstream: str | None = None,
    claim: str | None = None,
    four_bit: bool = True,
    changes_base: bool = False,
    keeps_places: bool = False,
):
    """Decorator: enter a function that builds a `Method` under `name`; its keyword arguments are the method's options.
    `upstream` names the config class of upstream peft for methods that are its own; `claim` what the authors report;
    `four_bit` whether it trains on 4-bit bases; `changes_base` whether it leaves another base beside its adapter;
    `keeps_places` whether a run's default of all linear layers is not for it.

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

        _METHODS[name] = MethodInfo(
            name, paper, moves, use_when, cost, with_info, upstream, claim, four_bit, changes_base, keeps_places
        )
        return with_info

    return enter


def get(name: str, **options: Any) -> Method:
    """Build the method `name`; `options` are its own and, behind them, any field of its config.

    Raises:
        ValueError: no such method (the message lists them), or an option that neither method nor config has.
    """
    if name not in _METHODS:
        raise ValueError(_unknown(name))
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


def names(upstream: bool | None = None) -> list[str]:
    """All method names, sorted; with `upstream` those of upstream peft's own methods (True), or the others (False)."""
    return sorted(n for n, info in _METHODS.items() if upstream is None or bool(info.upstream) == upstream)


def describe(name: str) -> MethodInfo:
    """The registry's entry of one method."""
    get_known = _METHODS.get(name)
    if get_known is None:
        raise ValueError(_unknown(name))
    return get_known


def _unknown(name: str) -> str:
    return how_to_call(name) or f"method {name!r} is unknown; choose one of {names()}."


def markdown_table() -> str:
    """The methods as the table of docs/methods.md."""
    lines = ["| method | source | what moves | use it when | cost |", "|---|---|---|---|---|"]
    for name, info in sorted(_METHODS.items()):
        paper = f"{info.paper}; peft's `{info.upstream}`" if info.upstream else info.paper
        lines.append(f"| `{name}` | {paper} | {info.moves} | {info.use_when} | {info.cost} |")
    return "\n".join(lines)


def claims_table() -> str:
    """What authors claim of their methods, as docs/methods.md shows it."""
    lines = ["| method | its authors claim | source |", "|---|---|---|"]
    lines += [f"| `{name}` | {i.claim} | {i.paper} |" for name, i in sorted(_METHODS.items()) if i.claim]
    return "\n".join(lines)


def row(overrides: dict[str, Any], **options: Any) -> Method:
    """The form of most rows: a method that is one `SparseLoraConfig`, the row's `options` with the user's in place."""
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))


def with_overrides(options: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A method's options with the user's in their place; `budget` and `density` replace each other."""
    options = dict(options)
    for name, other in (("budget", "density"), ("density", "budget")):
        if name in overrides and other not in overrides:
            options.pop(other, None)
    return {**options, **overrides}
