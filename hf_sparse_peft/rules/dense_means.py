"""Means over ranks of the dense gradients that layers lend in a backward pass, which may not reach all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .collectives import all_reduce_mean, all_reduce_sum, world_size


class DenseMeans:
    """Averages, for the readers of all rules of a run, the dense gradient of each layer that they choose units by.

    Where a layer ran on every rank it is averaged as it arrives, so that one dense gradient lives at a time. Where a
    rank's batch did not reach a layer (a tower, an expert) the others keep an fp32 copy until the micro-batch is
    closed, and that rank counts as 0 then. Which layers ran is told in one small collective at the end of each forward
    pass in whose backward pass something is to choose (`watch`): later, ranks are at other places among the sums of
    DistributedDataParallel.
    """

    def __init__(self) -> None:
        self.readers: list[Any] = []
        """Of the current step, the same ones in the same order on every rank."""
        self._ranks: list[int] | None = None
        """On how many ranks the layer of each reader ran and is still to choose; None before that is told."""
        self._held: dict[int, Tensor] = {}

    def join(self, reader: Any) -> None:
        """Average what `reader` asks for by `mean`, and hand what comes late to its `take_mean`."""
        self.readers.append(reader)
        reader.means = self

    def watch(self, model: nn.Module) -> Any:
        """Tell it at the end of each forward pass of `model`; returns the hook's handle."""
        return model.register_forward_hook(lambda *_: self._tell())

    def _tell(self) -> None:
        if torch.is_grad_enabled() and any(reader.chooses for reader in self.readers):
            self._ranks = None
            self._told(self.readers[0].device)

    def mean(self, reader: Any, dense: Tensor) -> Tensor | None:
        """The mean of the micro-batch's `dense`; None where `take_mean` will be called with it."""
        ranks, at = self._told(dense.device), self.readers.index(reader)
        if ranks[at] == world_size():
            return all_reduce_mean(dense.clone())
        self._held[at] = dense.to(torch.float32, copy=True)
        return None

    def _told(self, device: torch.device) -> list[int]:
        if self._ranks is None:
            ran = [int(reader.chooses and reader.ran) for reader in self.readers]
            self._ranks = all_reduce_sum(torch.tensor(ran, dtype=torch.int32, device=device)).tolist()
        return self._ranks

    @torch.no_grad()
    def close(self) -> None:
        """The micro-batch is complete: average what some ranks lack. Every rank calls it."""
        choosing = [reader for reader in self.readers if reader.chooses]
        if self._ranks is not None or choosing:
            for at, ranks in enumerate(self._told(self.readers[0].device)):
                if 0 < ranks < world_size():
                    reader = self.readers[at]
                    dense = self._held.pop(at, None)
                    dense = torch.zeros(reader.shape, device=reader.device) if dense is None else dense
                    reader.take_mean(all_reduce_mean(dense))
        self._ranks, self._held = None, {}
        for reader in self.readers:
            reader.ran = False

    def leave(self) -> None:
        """The step is over, however it ended."""
        self.readers, self._ranks, self._held = [], None, {}
