"""Following the memory of a step that runs on the meta device: which storages it makes, and how long they live."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .meta_answers import MetaAnswers

NETWORK, ADAPTER, LOGITS, GRADIENTS, WORKING = "network", "adapter", "logits", "gradients", "working"
"""What a storage is for: kept by the frozen network, by adapted layers, for the loss; a gradient; everything else."""


class MemoryTrace(MetaAnswers):
    """Bytes of the storages that operations make and that are alive, by what they are for, and at their highest.

    Operations that compute in one piece on a device are one piece here: the memory that kernels take for themselves is
    not seen.

    Args:
        held: tensors that were there before: they and views of them count nothing.
        classes: width of the logits.
    """

    def __init__(self, held: Iterable[torch.Tensor], classes: int | None = None) -> None:
        super().__init__()
        self.alive: dict[str, int] = dict.fromkeys((NETWORK, ADAPTER, LOGITS, GRADIENTS, WORKING), 0)
        self.at_peak = dict(self.alive)
        self._peak = self._now = 0
        self._purposes = WeakIdKeyDictionary()
        self._classes = classes
        self._in_adapter = 0
        self.packed: dict[int, int] = {}
        """Bytes of each storage that autograd packed."""
        for tensor in held:
            self._purposes[tensor.untyped_storage()] = [None, 0]

    def seen(self, out: Any) -> None:
        """Note the storages of an operation's outputs."""
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                for part in _parts(leaf):
                    self._note(part)

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._purposes:
            return
        mark = self._purposes[storage] = [WORKING, storage.nbytes()]
        weakref.finalize(storage, self._freed, mark).atexit = False
        self._count(mark, mark[1])

    def _count(self, mark: list, change: int) -> None:
        self.alive[mark[0]] += change
        self._now += change
        if self._now > self._peak:
            self._peak, self.at_peak = self._now, dict(self.alive)

    def _freed(self, mark: list) -> None:
        self._count(mark, -mark[1])

    def mark(self, tensor: torch.Tensor, purpose: str) -> None:
        """Say what the storage of `tensor` is for, unless that has been said."""
        mark = self._purposes.get(tensor.untyped_storage())
        if mark is None or mark[0] != WORKING:
            return
        self.alive[WORKING] -= mark[1]
        self.alive[purpose] += mark[1]
        mark[0] = purpose

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        for part in _parts(tensor) if tensor.is_meta else ():
            mark = self._purposes.get(part.untyped_storage())
            if mark is None or mark[0] is None:
                continue
            of_logits = self._classes is not None and part.ndim and part.shape[-1] == self._classes
            self.mark(part, LOGITS if of_logits else ADAPTER if self._in_adapter else NETWORK)
            self.packed[id(mark)] = mark[1]
        return tensor

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Within it, what the backward pass of `model` needs and its gradients are told apart."""
        handles: list[Any] = []
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                handles.append(module.register_forward_pre_hook(self._enter))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        for parameter in model.parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(self._gradient))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._in_adapter += 1

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._in_adapter -= 1

    def _gradient(self, parameter: torch.Tensor) -> None:
        for part in _parts(parameter.grad):
            self.mark(part, GRADIENTS)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor.crow_indices(), tensor.col_indices(), tensor.values()] if tensor.layout == torch.sparse_csr else []


class _FusedAttention(torch.autograd.Function):
    """Attention as fused kernels keep it: queries, keys, values, the output, and a normaliser for each query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # Fused kernels answer in the layout [batch, tokens, heads, width].
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        out = query.new_empty(shape).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Within it, `scaled_dot_product_attention` on meta keeps what a fused kernel keeps. On its own it would take the
    form that keeps a number for every pair of tokens, which no device takes unless asked to."""
    functional, original = torch.nn.functional, torch.nn.functional.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.is_meta and query.ndim == 4:
            return _FusedAttention.apply(query, key, value)
        return original(query, key, value, *args, **kwargs)

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def trace_step(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    held: Iterable[torch.Tensor],
    *,
    classes: int | None = None,
    backward: bool = True,
    passes: int = 1,
    after_forward: Callable[[MemoryTrace], None] = lambda trace: None,
) -> MemoryTrace:
    """Run the forward pass of one batch, `passes` times, and, unless it is left out, the backward pass on the meta
    device; `after_forward` is called between the two."""
    trace = MemoryTrace([*held, *batch.values()], classes)
    gradients = torch.set_grad_enabled(backward)
    with fused_attention(), trace, trace.following(model), gradients, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a run that is none: no runner, layers that did not run
        loss = model(**batch).loss
        for _ in range(passes - 1):
            loss = loss + model(**batch).loss
        after_forward(trace)
        if backward and loss.requires_grad:
            loss.backward()
    return trace
