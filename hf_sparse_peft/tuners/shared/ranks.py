"""Buffers of adapters over the ranks of a run: alike at the start, and not sent again at every forward pass.

DistributedDataParallel sends all buffers from the first rank whenever the model is called. Those of an adapter, indices
of supports and the state of rules, are more bytes than its gradients, and every rank writes the same into them: rules
decide by sums over ranks and by seeds. So DDP is told to pass them by; other buffers (of the base, of heads) are sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ...rules.collectives import match_first_rank
from .tensors import AdapterTensors

_hook: Any = None


def adapter_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names in `model`, and buffers, of the adapters of this package: as many as `named_buffers` has of them."""
    layers = adapter_modules(model)
    for name, buffer in model.named_buffers():
        if _is_own(layers, name):
            yield name, buffer


def adapter_modules(model: nn.Module) -> dict[str, AdapterTensors]:
    """The adapted layers by their names in `model`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterTensors)}


def _is_own(layers: dict[str, AdapterTensors], name: str) -> bool:
    path, _, container = name.rpartition(".")[0].rpartition(".")
    return path in layers and isinstance(getattr(layers[path], container, None), BufferDict)


class _PassedBy(set):
    """Names that DDP is to leave alone: those that it was given, and all buffers that adapters have, now or later."""

    def __init__(self, names: Iterable[str], model: nn.Module) -> None:
        super().__init__(names)
        self.layers = adapter_modules(model)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and _is_own(self.layers, name))


def leave_buffers_to_ranks() -> None:
    """From now on, take the buffers of adapters from the first rank once, when DistributedDataParallel takes a model
    over, and let it send them no more."""
    global _hook
    if _hook is None:
        _hook = register_module_module_registration_hook(_before_ddp)


def _before_ddp(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if not isinstance(parent, nn.parallel.DistributedDataParallel) or child is None:
        return
    if adapter_modules(child) and hasattr(parent, "parameters_to_ignore"):
        parent.parameters_to_ignore = _PassedBy(parent.parameters_to_ignore, child)
        match_ranks(child, dict(adapter_buffers(child)), parent.process_group)


def match_ranks(model: nn.Module, tensors: dict[str, Tensor], group: Any = None) -> None:
    """Give every rank the first one's content of `tensors` of `model`, by their names there, and say so where buffers
    of adapters differed.

    Raises:
        ValueError: ranks have tensors of other names, shapes or dtypes.
    """
    changed = match_first_rank({name: one.data for name, one in tensors.items() if not one.is_meta}, group)
    layers = adapter_modules(model)
    buffers = [name for name in changed if _is_own(layers, name)]
    for name in buffers:
        path, adapter_name = name.rpartition(".")[0].rpartition(".")[0], name.rpartition(".")[2]
        layers[path].forget_decoded(adapter_name)
    if buffers:
        warnings.warn(
            f"'{buffers[0]}' and {len(buffers) - 1} more buffers of adapters differed between ranks; all have the "
            "first rank's now. Add the adapter with the same seed on every rank, or load one file on all of them.",
            stacklevel=2,
        )
