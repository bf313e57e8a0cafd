"""Importance of a weight's columns and rows by what flows through them: forward passes only, no gradient.

A column's norm is that of the inputs it reads, a row's that of the outputs it gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.parts import register_part
from .scores import Chunks, Magnitude
from .statistics import DataCriterion
from .support import UnitGrid
from .weight_statistics import State


@register_part("activation")
@dataclass(frozen=True)
class Activation(DataCriterion):
    r"""Activation norm of a unit over all tokens: :math:`\sqrt{\sum_t x_{tc}^2}` of column c's input,
    :math:`\sqrt{\sum_t y_{tr}^2}` of row r's output (S2FT's activation strategies; Yang et al., 2024).

    Sums of squares in fp32, `rows + cols` numbers a weight; tokens that a batch's attention mask hides do not count.
    Raises `ValueError` for entries and blocks, which have no activation of their own.
    """

    reads_activations: ClassVar[bool] = True

    def check_grid(self, grid: UnitGrid, name: str) -> None:
        """Rows and columns only."""
        if grid.granularity not in ("row", "column"):
            raise ValueError(
                f"criterion='{self.part_type}' ranks columns by their inputs and rows by their outputs, and '{name}' "
                f"is cut into units of granularity '{grid.granularity}'. Set granularity or granularity_pattern to "
                "'column' or 'row' there, or choose criterion='gradient'."
            )

    def state_numel(self, rows: int, cols: int) -> int:
        """One number a row and one a column."""
        return rows + cols

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """Sums at zero."""
        return {"input": torch.zeros(cols, device=device), "output": torch.zeros(rows, device=device)}

    def observe(self, state: State, inputs: Tensor, outputs: Tensor) -> None:
        """Add the squares of `inputs` `[tokens, cols]` and `outputs` `[tokens, rows]`, any float dtype, in place."""
        state["input"].add_(inputs.float().square().sum(0))
        state["output"].add_(outputs.float().square().sum(0))

    def unit_norms(self, state: State, grid: UnitGrid) -> Tensor:
        """fp32 `[num_units]`."""
        self.check_grid(grid, "the weight")
        return state["input" if grid.granularity == "column" else "output"].sqrt()

    def scores(self, state: State, grid: UnitGrid, weight: Tensor | None = None) -> Chunks:
        """All units' scores, as one chunk."""
        norms = self.unit_norms(state, grid)
        return lambda: iter((norms if self.largest else -norms,))


@register_part("weighted_activation")
@dataclass(frozen=True)
class WeightedActivation(Activation):
    r"""Weight norm times activation norm of a unit: :math:`\sum |w|` over its entries times its `activation` (S2FT's
    strategy of both; Yang et al., 2024)."""

    def scores(self, state: State, grid: UnitGrid, weight: Tensor | None = None) -> Chunks:
        """All units' scores, as one chunk."""
        norms = self.unit_norms(state, grid) * torch.cat(list(Magnitude()(weight, grid)()))
        return lambda: iter((norms if self.largest else -norms,))
