"""A model that stays as it was when what is done to it fails: modules, tensors, hooks, flags."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Whatever ends the block early, an interrupt too, leaves `model` with the modules, attributes, parameters,
    buffers, hooks and `requires_grad` flags that it had. Tensors are not copied: writing into one is not undone."""
    modules = list(model.modules())
    attributes = [(module, {name: _Kept(value) for name, value in vars(module).items()}) for module in modules]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        with uninterrupted():
            for module, kept in attributes:
                for name in [name for name in vars(module) if name not in kept]:
                    del vars(module)[name]
                vars(module).update({name: value.restored() for name, value in kept.items()})
            for parameter, flag in trained:
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done. Python delivers it to the main thread alone."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *arguments: pressed.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        before(*pressed[0])


class _Kept:
    """An attribute's value; of dicts, lists and sets the contents too, put back into the same object."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.contents = copy.copy(value) if isinstance(value, (dict, list, set)) else None

    def restored(self) -> Any:
        if isinstance(self.value, (dict, set)) and not _same(self.value, self.contents):
            self.value.clear()
            self.value.update(self.contents)
        elif isinstance(self.value, list):
            self.value[:] = self.contents
        return self.value


def _same(now: dict | set, before: dict | set) -> bool:
    if isinstance(now, set):
        return now == before
    return list(now) == list(before) and all(now[key] is before[key] for key in before)
