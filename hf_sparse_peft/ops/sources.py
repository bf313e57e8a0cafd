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
    """Which thread may write into frozen weights for the length of a product.

    The first thread that computes owns that right while it lives. Once a second one computes at the same time nobody
    borrows any more: clones cost time, a weight that changes under another thread's product costs correctness.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner: int | None = None
        self.shared = False

    def allows(self, thread: int) -> bool:
        if self.shared:
            return False
        if self.owner != thread:
            alive = {t.ident for t in threading.enumerate()}
            if self.owner is not None and self.owner in alive:
                with self.lock:  # wait until a product in flight has put its weight back
                    self.shared = True
                return False
            self.owner = thread
        return True


_state = _BorrowState()


def may_borrow(weight: torch.Tensor, thread: int) -> bool:
    """Whether `weight`'s own memory may hold `base + value` while one product of thread `thread` runs."""
    return (
        type(weight) in (torch.Tensor, torch.nn.Parameter)  # DTensor and other subclasses guard their own storage
        and not weight.is_inference()
        and not weight.requires_grad
        # CUDA tensors always report shared memory; on CPU it means that other processes read the same bytes.
        and not (weight.device.type == "cpu" and weight.is_shared())
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and _state.allows(thread)
    )


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
