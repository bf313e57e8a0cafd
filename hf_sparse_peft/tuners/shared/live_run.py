"""The training run that is under way on a model: which callbacks take part, and what ends with it."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import Trainer

from ...rules import UpdateMask

_RUNS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[LiveRun]] = weakref.WeakKeyDictionary()
_WARNED: weakref.WeakValueDictionary[int, PeftConfig] = weakref.WeakValueDictionary()


class LiveRun:
    """One call of a training loop, from the first `on_train_begin` of a callback of this package to the last
    `on_train_end`, or to the exception that broke it off.

    Marks that rules leave on a model (parameters held still, hooks, gradient readers, draws of experts) belong to the
    run: `end` takes them away. No event tells a callback of an exception, so a run ends in one of four ways, whichever
    comes first: its callbacks leave; `Trainer.train` returns or raises (`end_with_train`); somebody asks for the run
    and its loop is no longer on its thread's stack; nobody holds it any more.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module], loop: FrameType | None) -> None:
        self.mask = UpdateMask()
        self.released: list[nn.Parameter] = []
        """What an earlier run that was broken off had held still when this one began."""
        self.trainer = None if loop is None else weakref.ref(loop.f_locals["self"])
        self._loop, self._thread = loop, threading.get_ident()
        self._ended = False
        self._undo: dict[Any, Callable[[], None]] = {}
        self._rules_run: dict[int, tuple[PeftConfig, set[str]]] = {}
        for module in (model, *layers):
            _RUNS[module] = weakref.ref(self)

    @property
    def is_live(self) -> bool:
        """Whether its loop goes on. A loop by hand, without a Trainer, goes on until its callbacks leave."""
        if self._loop is not None and not self._ended:
            frame = sys._current_frames().get(self._thread)
            while frame is not None and frame is not self._loop:
                frame = frame.f_back
            if frame is None:
                self.end()
        return not self._ended

    def note_rule(self, config: PeftConfig, option: str) -> None:
        """Note that a callback carries out `option` of this adapter's config."""
        _WARNED.pop(id(config), None)
        self._rules_run.setdefault(id(config), (config, set()))[1].add(option)

    def rules_run_for(self, config: PeftConfig) -> set[str]:
        """Options of this adapter's config that a callback carries out."""
        return self._rules_run.get(id(config), (config, set()))[1]

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
        if self._ended:
            return []
        self._ended, self._loop = True, None
        undo, self._undo = self._undo, {}
        for take_off in undo.values():
            take_off()
        for config, _ in self._rules_run.values():
            _WARNED.pop(id(config), None)
        return self.mask.release()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.end()


def begin_run(model: nn.Module, layers: Iterable[nn.Module], alone: bool = False) -> LiveRun:
    """The run that the calling callback takes part in: the first begins it, and ends what was broken off before.

    Args:
        alone: begin a run of one's own and end any other on these layers, as a loop without a Trainer does.
    """
    loop, known, rested = _trainer_frame(), _run_of(model), []
    if alone:
        layers = list(layers)
        rested = [one for run in {_run_of(module) for module in (model, *layers)} - {None} for one in run.end()]
    elif known is not None:
        if known._loop is loop and not known._ended:
            return known
        rested = known.end()
    run = LiveRun(model, layers, loop)
    run.released = rested
    return run


def run_on(module: nn.Module) -> LiveRun | None:
    """The live run on an adapted layer or a whole model; one that was broken off is ended here."""
    run = _run_of(module)
    return run if run is not None and run.is_live else None


def end_with_train() -> None:
    """Called while a Trainer is built: let its `train` end the run however it ends itself.

    Trainer tells callbacks of no exception, and the next Trainer's optimizer is built before any callback is asked.
    """
    frame = _trainer_frame()
    if frame is None or "train" in vars(frame.f_locals["self"]):
        return
    trainer = frame.f_locals["self"]
    train = trainer.train

    @functools.wraps(train)
    def train_and_end(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            run = _run_of(trainer.model)
            if run is not None:
                run.end()

    trainer.train = train_and_end


def first_warning(config: PeftConfig) -> bool:
    """True once a run and adapter."""
    if _WARNED.get(id(config)) is config:
        return False
    _WARNED[id(config)] = config
    return True


def trainer_on_stack() -> Trainer | None:
    """The Trainer whose method this is called in, however deep."""
    frame = _trainer_frame()
    return None if frame is None else frame.f_locals["self"]


def _run_of(module: nn.Module) -> LiveRun | None:
    reference = _RUNS.get(module)
    return None if reference is None else reference()


def _trainer_frame() -> FrameType | None:
    """The innermost frame of a Trainer's method, among the callers."""
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    return frame
