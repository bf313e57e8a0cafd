"""Parameters that are shifted only while the forward of the module that owns them runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Containers of parameters: they are never called, the module around them reads what they hold.
_CONTAINERS = (nn.ParameterDict, nn.ParameterList)


class _Shift:
    """Keeps what a module's parameters were; a tied parameter of nested modules is shifted and brought back once."""

    def __init__(self, shift: Callable[[str, Tensor], None]) -> None:
        self.shift = shift
        self.kept: dict[int, tuple[Tensor, int]] = {}
        self.reached: set[str] = set()

    @torch.no_grad()
    def enter(self, module: nn.Module, args: Any, owned: dict[str, nn.Parameter]) -> None:
        for name, parameter in owned.items():
            copy, depth = self.kept.get(id(parameter), (None, 0))
            if not depth:
                copy = parameter.detach().clone()
                self.kept[id(parameter)] = (copy, 1)  # before the shift: an exception in it finds the copy
                self.shift(name, parameter)
            else:
                self.kept[id(parameter)] = (copy, depth + 1)
            self.reached.add(name)

    @torch.no_grad()
    def leave(self, module: nn.Module, args: Any, output: Any, owned: dict[str, nn.Parameter]) -> None:
        for parameter in owned.values():
            copy, depth = self.kept.get(id(parameter), (None, 0))
            if depth == 1:
                parameter.data.copy_(copy)
                del self.kept[id(parameter)]
            elif depth:
                self.kept[id(parameter)] = (copy, depth - 1)


@contextmanager
def layerwise_shift(
    model: nn.Module, named: dict[str, nn.Parameter], shift: Callable[[str, nn.Parameter], None]
) -> Iterator[None]:
    """Inside, `shift(name, parameter)` is applied to a module's parameters before its forward, and undone bit for bit
    after it, by a copy of that module's parameters.

    Warns for parameters whose owner was never called inside: they were not shifted.

    Raises:
        ValueError: a parameter that `model` does not hold.
    """
    work = _Shift(shift)
    owners = _owners(model, named)
    handles = []
    for module, owned in owners:
        handles.append(module.register_forward_pre_hook(partial(work.enter, owned=owned)))
        handles.append(module.register_forward_hook(partial(work.leave, owned=owned), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(set(named) - work.reached)
    if missed:
        warnings.warn(
            f"perturbation='layerwise' never reached {missed[:3]} ({len(missed)} parameters): the forward of the "
            f"module "
            "that owns them did not run, so they were not perturbed. If the model reads them elsewhere, take "
            "perturbation='in_place'; if it does not use them, freeze them.",
            stacklevel=2,
        )


def _owners(model: nn.Module, named: dict[str, nn.Parameter]) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    names = {id(parameter): name for name, parameter in named.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[int, tuple[nn.Module, dict[str, nn.Parameter]]] = {}
    for path, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) not in names:
                continue
            owner, place = module, path
            while isinstance(owner, _CONTAINERS):
                place = place.rpartition(".")[0]
                owner = modules[place]
            found.setdefault(id(owner), (owner, {}))[1][names[id(parameter)]] = parameter
    held = {name for _, owned in found.values() for name in owned}
    if missing := sorted(set(named) - held):
        raise ValueError(
            f"The model does not hold the optimizer's parameters {missing[:3]}: pass the model they are of."
        )
    return list(found.values())
