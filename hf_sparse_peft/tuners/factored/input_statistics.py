"""Moments of a layer's inputs, which forms start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...sparsity import Statistic
from ...sparsity.weight_statistics import State


@dataclass(frozen=True)
class InputMoments(Statistic):
    r"""Moments of a layer's inputs over tokens: `state["mean"]` `[cols]`, :math:`\mathbb{E}[x]`, and `state["second"]`,
    :math:`\mathbb{E}[x x^\top]` `[cols, cols]` or, without `full`, its diagonal `[cols]`.

    Sums in fp32; tokens that a batch's attention mask hides do not count.
    """

    full: bool = True
    """Whether all products of two features are read, or the squares alone."""

    reads_activations: ClassVar[bool] = True

    def state_numel(self, rows: int, cols: int) -> int:
        """The moments'."""
        return cols + (cols * cols if self.full else cols)

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """Sums at zero."""
        second = (cols, cols) if self.full else (cols,)
        return {"mean": torch.zeros(cols, device=device), "second": torch.zeros(second, device=device)}

    def observe(self, state: State, inputs: Tensor, outputs: Tensor) -> None:
        """Add the inputs `[tokens, cols]`."""
        inputs = inputs.float()
        state["mean"].add_(inputs.sum(0))
        state["second"].add_(inputs.t() @ inputs if self.full else inputs.square().sum(0))

    def finish(self, state: State, count: int) -> None:
        """Divide by the tokens."""
        for tensor in state.values():
            tensor.div_(max(count, 1))
