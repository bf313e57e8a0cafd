"""Where the frozen weight of one product comes from, with a support standing on it for just that product.

A dense weight is borrowed: `base + value` is written into the frozen weight itself and the overwritten entries are put
back bit for bit before the product's caller goes on. A dequantised or cast weight, or a clone where the weight must not
be touched, is a private buffer and simply gets the support added.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .units import add_units_, write_units_


@dataclass(frozen=True)
class Support:
    """Units of a weight and what is added there: `units` int32/int64 `[k]`, sorted and distinct; `values` fp32."""

    units: torch.Tensor
    values: torch.Tensor
    granularity: str
    block_size: int = 0


class _BorrowState:
    """Who may write into frozen weights for the length of a product.

    The first thread (and, on a GPU, stream) that computes has that right while it lives. Once a second one computes as
    well nobody borrows any more: a clone costs time, a weight that changes under another's product costs correctness.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner: tuple[int, int] | None = None
        self.shared = False

    def allows(self, worker: tuple[int, int]) -> bool:
        if self.shared:
            return False
        if self.owner != worker:
            if self.owner is not None and self.owner[0] in {thread.ident for thread in threading.enumerate()}:
                with self.lock:  # a product in flight puts its weight back first
                    self.shared = True
                return False
            self.owner = worker
        return True


_state = _BorrowState()


def may_borrow(weight: torch.Tensor, thread: int) -> bool:
    """Whether `weight`'s own memory may hold `base + value` while one product of thread `thread` runs.

    No for memory that others may read meanwhile or that is not the weight's alone: subclasses that guard their storage
    (DTensor), ZeRO's and FSDP's buffers, memory shared between processes, inference tensors, and anything at all once a
    second thread or stream computes.
    """
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or hasattr(weight, "ds_id"):
        return False
    if weight.is_inference() or weight.requires_grad:
        return False
    if weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        return False  # a slice of a larger buffer, such as FSDP's flat parameter
    # CUDA tensors always report shared memory; on CPU it means that other processes read the same bytes.
    if weight.device.type == "cpu" and weight.is_shared():
        return False
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    return (weight.is_contiguous() or weight.t().is_contiguous()) and _state.allows((thread, stream))


@dataclass(frozen=True)
class DenseSource:
    """A dense frozen weight of a layer, `[rows, cols]` or its transpose in memory (`transposed`)."""

    weight: torch.Tensor
    transposed: bool = False

    @contextmanager
    def standing(self, support: Support | None, dtype: torch.dtype, thread: int) -> Iterator[torch.Tensor]:
        """The `[rows, cols]` weight in `dtype` with the support added, valid inside the `with` block only."""
        # `.data` has its own version counter: graphs that saved this weight must not notice a borrow that was undone.
        weight = self.weight.data.t() if self.transposed else self.weight.data
        if support is None:
            with _state.lock:
                yield weight.to(dtype)
        elif weight.dtype == dtype and may_borrow(self.weight, thread):
            with _state.lock:
                before = add_units_(weight, support.units, support.values, support.granularity, support.block_size)
                try:
                    yield weight
                finally:
                    write_units_(weight, support.units, before, support.granularity, support.block_size)
        else:
            with _state.lock:
                private = weight.to(dtype, copy=True)
            add_units_(private, support.units, support.values, support.granularity, support.block_size)
            yield private


@dataclass(frozen=True)
class DequantizedSource:
    """A quantised weight: `dequantize(dtype)` returns a fresh `[rows, cols]` buffer at every call."""

    dequantize: Callable[[torch.dtype], torch.Tensor]

    @contextmanager
    def standing(self, support: Support | None, dtype: torch.dtype, thread: int) -> Iterator[torch.Tensor]:
        weight = self.dequantize(dtype)
        if support is not None:
            add_units_(weight, support.units, support.values, support.granularity, support.block_size)
        yield weight


Source = DenseSource | DequantizedSource
