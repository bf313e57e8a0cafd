"""Means over ranks of the dense gradients that layers lend in a backward pass, which may not reach all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .collectives import all_reduce_mean, all_reduce_sum, own_group, same_on_every_rank, world_size


class DenseMeans:
    """Averages, for the readers of all rules of a run, the dense gradient of each layer that they choose units by.

    Where a layer ran on every rank it is averaged as it arrives, so that one dense gradient lives at a time. Where a
    rank's batch did not reach a layer (a tower, an expert) the others keep an fp32 copy until the micro-batch is
    closed, and that rank counts as 0 then. Which layers ran is told in one small collective at the end of each forward
    pass in whose backward pass something is to choose (`watch`).

    A layer that ran may still have no gradient on a rank: its output never reached the loss. Ranks therefore tell which
    layer they are at before they average one, and whether they are through. Where they are not at the same one, what
    is left of the micro-batch is kept as above, on all of them. This has a process group of its own: in the default one
    ranks would be at other places among the sums of DistributedDataParallel.
    """

    def __init__(self) -> None:
        self.readers: list[Any] = []
        """Of the current step, the same ones in the same order on every rank."""
        self._ranks: list[int] | None = None
        """On how many ranks the layer of each reader ran and is still to choose; None before that is told."""
        self._held: dict[int, Tensor] = {}
        self._together = True
        """Whether ranks were at the same layers so far in this micro-batch."""
        self._group: Any = None

    def join(self, reader: Any) -> None:
        """Average what `reader` asks for by `mean`, and hand what comes late to its `take_mean`."""
        self.readers.append(reader)
        reader.means = self

    def watch(self, model: nn.Module) -> Any:
        """Tell it at the end of each forward pass of `model`; returns the hook's handle. Every rank calls it."""
        self._group = own_group()
        return model.register_forward_hook(lambda *_: self._tell())

    def _tell(self) -> None:
        if torch.is_grad_enabled() and any(reader.chooses for reader in self.readers):
            self._ranks = None
            self._told()

    def mean(self, reader: Any, dense: Tensor) -> Tensor | None:
        """The mean of the micro-batch's `dense`; None where `take_mean` will be called with it."""
        at = self.readers.index(reader)
        if self._told()[at] == world_size() and self._meet(at):
            return all_reduce_mean(dense.clone(), self._group)
        if at in self._held:
            self._held[at].add_(dense)
        else:
            self._held[at] = dense.to(torch.float32, copy=True)
        return None

    def _told(self) -> list[int]:
        if self._ranks is None:
            self._ranks = self._sum([reader.chooses and reader.ran for reader in self.readers])
        return self._ranks

    def _meet(self, at: int) -> bool:
        """Whether all ranks are at the same place, and were until now; once they are not, nobody asks again."""
        self._together = self._together and same_on_every_rank(at, self.readers[0].device, self._group)
        return self._together

    def _sum(self, flags: list[bool]) -> list[int]:
        flags = torch.tensor(flags, dtype=torch.int32, device=self.readers[0].device)
        return all_reduce_sum(flags, self._group).tolist()

    @torch.no_grad()
    def close(self) -> None:
        """The micro-batch is complete: average what some ranks lack. Every rank calls it."""
        if self._ranks is not None or any(reader.chooses for reader in self.readers):
            self._told()
            self._meet(len(self.readers))  # those that are still at a layer keep it from here on
            self._average_held()
        self._ranks, self._held, self._together = None, {}, True
        for reader in self.readers:
            reader.ran = False

    def _average_held(self) -> None:
        """Average what any rank has kept; the others count as 0."""
        for at, count in enumerate(self._sum([at in self._held for at in range(len(self.readers))])):
            if count:
                reader = self.readers[at]
                dense = self._held.pop(at, None)
                dense = torch.zeros(reader.shape, device=reader.device) if dense is None else dense
                reader.take_mean(all_reduce_mean(dense, self._group))

    def leave(self) -> None:
        """The step is over, however it ended."""
        self.readers, self._ranks, self._held, self._together = [], None, {}, True
