"""The training run that is under way on a model: which callbacks take part, and what ends with it."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import Trainer

from ...rules import Rule, UpdateMask

_RUNS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LiveRun]] = weakref.WeakKeyDictionary()
_WARNED: weakref.WeakValueDictionary[int, PeftConfig] = weakref.WeakValueDictionary()


class LiveRun:
    """One pass through a training loop, from the first `on_train_begin` of a callback of this package to the last
    `on_train_end`, or to the exception that broke it off.

    Marks that rules leave on a model (parameters held still, hooks, gradient readers, draws of experts) belong to the
    run: `end` takes them away. A run ends when its last callback leaves, when the `Trainer.train` that it began in
    returns or raises (`end_runs_with_train`), when another run begins on the model, or when nobody refers to it any
    more, whichever comes first.

    Args:
        modules: the model and its adapted layers.
        loop: identifies the loop; callbacks with the same one take part in one run.
    """

    def __init__(self, modules: Iterable[nn.Module], loop: Any) -> None:
        self.mask = UpdateMask()
        self.released: list[nn.Parameter] = []
        """What an earlier run that was broken off had held still when this one began."""
        self.loop = loop
        self.is_live = True
        self._undo: dict[Any, Callable[[], None]] = {}
        self._shared: dict[type, tuple[Any, Callable[[Any], None]]] = {}
        self._rules: dict[int, tuple[PeftConfig, list[Rule]]] = {}
        for module in modules:
            _RUNS[module] = weakref.ref(self)
        call = _TRAIN_CALL.get()
        if call is not None and loop is not None:
            call.runs.add(self)

    def note_rule(self, config: PeftConfig, rule: Rule) -> None:
        """Note that a callback runs `rule` on the adapter with this config."""
        _WARNED.pop(id(config), None)
        self._rules.setdefault(id(config), (config, []))[1].append(rule)

    def rules_run_for(self, config: PeftConfig) -> list[Rule]:
        """The rules that callbacks run on the adapter with this config."""
        return self._rules.get(id(config), (config, []))[1]

    def shared(self, kind: type, make: Callable[[], Any], undo: Callable[[Any], None]) -> Any:
        """The one object of that kind that all callbacks of the run use; made by the first, taken off by `undo` when
        the run ends."""
        if kind not in self._shared:
            self._shared[kind] = (make(), undo)
        return self._shared[kind][0]

    def join(self, callback: Any, undo: Callable[[], None]) -> None:
        """`callback` takes part; `undo` takes its marks off the model, whenever the run ends."""
        self._undo[callback] = undo

    def leave(self, callback: Any) -> None:
        """`callback` is done; with the last one the run ends."""
        undo = self._undo.pop(callback, None)
        if undo is not None:
            undo()
        if not self._undo:
            self.end()

    def end(self) -> list[nn.Parameter]:
        """Take all marks off the model; returns the parameters that were held still. Nothing to do a second time."""
        self.is_live, self.loop = False, None
        while self._undo:  # an interrupt in here is followed by another call of `end`, which goes on here
            callback = next(iter(self._undo))
            self._undo[callback]()
            self._undo.pop(callback, None)
        while self._shared:
            one, undo = self._shared.popitem()[1]
            undo(one)
        for config, _ in self._rules.values():
            _WARNED.pop(id(config), None)
        self._rules = {}
        return self.mask.release()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.end()


def begin_run(model: nn.Module, layers: Iterable[nn.Module], loop: Any = None) -> LiveRun:
    """The run that the calling callback takes part in: the first begins it, and ends any other on these modules.

    Args:
        model: what trains.
        layers: its adapted layers.
        loop: what the callbacks of one loop have in common and no other loop has: a Trainer makes a `TrainerState` for
            every pass through its own. None: a loop that shares its run with nobody.
    """
    modules = [model, *layers]
    known = [run for run in {id(run): run for run in map(_run_of, modules)}.values() if run is not None]
    for run in known:
        if run.is_live and loop is not None and run.loop is loop:
            return run
    released = [parameter for run in known for parameter in run.end()]
    run = LiveRun(modules, loop)
    run.released = released
    return run


def run_on(module: nn.Module) -> LiveRun | None:
    """The live run on an adapted layer or a whole model."""
    run = _run_of(module)
    return run if run is not None and run.is_live else None


def first_warning(config: PeftConfig) -> bool:
    """True once a run and adapter."""
    if _WARNED.get(id(config)) is config:
        return False
    _WARNED[id(config)] = config
    return True


def _run_of(module: nn.Module) -> LiveRun | None:
    reference = _RUNS.get(module)
    return None if reference is None else reference()


# Calls of Trainer.train


@dataclass(eq=False)
class _TrainCall:
    """A call of `Trainer.train` that has not returned."""

    trainer: Trainer
    runs: weakref.WeakSet[LiveRun] = field(default_factory=weakref.WeakSet)
    """Runs that began within it."""


_TRAIN_CALL: ContextVar[_TrainCall | None] = ContextVar("train_call", default=None)
"""The innermost call in this thread."""


def current_trainer() -> Trainer | None:
    """The Trainer whose `train` this is called within, however deep."""
    call = _TRAIN_CALL.get()
    return None if call is None else call.trainer


def end_runs_with_train() -> None:
    """Let `Trainer.train` end the runs that began within it, however it ends itself; does nothing the second time.

    Trainer tells callbacks of no exception, and hands none of them itself: whatever has to happen before the next
    thing does anything to the model must happen where `train` is left. The method of the class is wrapped, and not
    that of one Trainer, so that callbacks which join by `add_callback` have it too. A subclass whose `train` never
    calls `Trainer.train` is like a loop by hand: its runs end in one of the other ways (`LiveRun`).
    """
    original = Trainer.train
    if getattr(original, "_ends_runs", False):
        return

    @functools.wraps(original)
    def train(self, *args: Any, **kwargs: Any) -> Any:
        with _train_call(self):
            return original(self, *args, **kwargs)

    train._ends_runs = True
    Trainer.train = train


@contextmanager
def _train_call(trainer: Trainer) -> Iterator[None]:
    call = _TrainCall(trainer)
    token = _TRAIN_CALL.set(call)
    try:
        yield
    finally:
        _TRAIN_CALL.reset(token)
        for run in list(call.runs):
            run.end()
