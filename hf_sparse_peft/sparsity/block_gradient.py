r"""Scores of blocks by the sum of a weight's gradients over some optimizer steps (SMT; He et al., 2025).

All read :math:`\Sigma = \sum_t G_t`, signed, with one mean gradient :math:`G_t` an optimizer step. A block whose
gradient changes its sign at every step therefore ranks last, however large each of them is.

| score         | of a block b of :math:`\Sigma`, `[size, size]` | name in SMT's code |
|---------------|------------------------------------------------|--------------------|
| `abs_of_mean` | :math:`|\mathrm{mean}(b)|`                     | `mean_abs`         |
| `mean_of_abs` | :math:`\mathrm{mean}(|b|)`                     | `abs_mean`         |
| `l2`          | :math:`\|b\|_F`                                | `L2`               |

SMT's code names the first two by the order of its calls, the opposite of how they read; its `L1` ranks as
`mean_of_abs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..utils.option_types import PositiveFloat, PositiveInt
from ..utils.parts import register_part, require
from .scores import Chunks, chunks_of
from .selection import chunk_size
from .statistics import DataCriterion, DeltaMagnitude
from .support import UnitGrid
from .weight_statistics import State

BlockScore = Literal["abs_of_mean", "mean_of_abs", "l2"]


@register_part("block_gradient")
@dataclass(frozen=True)
class BlockGradient(DataCriterion):
    r"""Blocks by the signed sum of the gradients of `steps` optimizer steps at the weights that training starts from:
    nothing trains while it is read.

    `abs_of_mean` keeps one fp32 number a block, exactly: mean and sum commute. The others keep a dense fp32 sum.
    """

    steps: PositiveInt = 100
    """Optimizer steps whose gradients are added up (SMT: 100). `examples` is not read, but for `max_examples` of
    `initialize_support`, which ends the sum sooner."""
    score: BlockScore = "abs_of_mean"
    """What of a block's sum ranks it; see the table above. SMT's command asks for `mean_of_abs`, its code takes
    `abs_of_mean` for attention whatever is asked for."""
    block_size: PositiveInt = 256
    """Side of a block, as the config's `block_size`."""

    per_step: ClassVar[bool] = True

    @property
    def steps_read(self) -> int:
        """`steps`."""
        return self.steps

    def check_grid(self, grid: UnitGrid, name: str) -> None:
        """Raises `ValueError` for other units than blocks, and for blocks of another size; names the module `name`."""
        if grid.granularity != "block" or grid.block_size != self.block_size:
            found = f"blocks of {grid.block_size}" if grid.granularity == "block" else f"{grid.granularity} units"
            raise ValueError(
                f"'{name}': criterion='{self.part_type}' scores blocks of block_size={self.block_size}, and the "
                f"support has {found}. Set granularity='block' and the same block_size in the config and in the "
                "criterion."
            )

    def state_numel(self, rows: int, cols: int) -> int:
        """One number a block, or one an entry."""
        return self.step_numel(rows, cols)

    def step_numel(self, rows: int, cols: int) -> int:
        """As many while the micro-batches of a step are added up."""
        return rows * cols // (self.block_size**2 if self.score == "abs_of_mean" else 1)

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """Sums at zero."""
        if self.score == "abs_of_mean":
            rows, cols = rows // self.block_size, cols // self.block_size
        return {"sum": torch.zeros(rows, cols, device=device)}

    def reduce(self, gradient: Tensor) -> Tensor:
        """Means of blocks, `[rows / size, cols / size]`, where they are all that the score needs."""
        if self.score != "abs_of_mean":
            return gradient
        rows, cols = gradient.shape
        size = self.block_size
        return gradient.reshape(rows // size, size, cols // size, size).mean((1, 3))

    def scores(self, state: State, grid: UnitGrid, weight: Tensor | None = None) -> Chunks:
        """Score chunks of all blocks."""
        total, size = state["sum"], self.block_size

        def chunks() -> Iterator[Tensor]:
            if self.score == "abs_of_mean":
                found = iter((total.abs().reshape(-1),))
            elif self.score == "mean_of_abs":
                read = chunks_of(lambda begin, end: total[begin:end].abs(), grid, chunk_size(total.device))
                found = (chunk / size**2 for chunk in read())
            else:
                read = chunks_of(lambda begin, end: total[begin:end].square(), grid, chunk_size(total.device))
                found = (chunk.sqrt() for chunk in read())
            yield from found if self.largest else (-chunk for chunk in found)

        return chunks


@register_part("warmed_block_gradient")
@dataclass(frozen=True)
class WarmedBlockGradient(DeltaMagnitude):
    r"""`BlockGradient` while the targeted weights train in full, as published; then they are put back.

    SMT adds up the gradients of the first `warmup_steps` steps of full fine-tuning and never undoes these. An adapter
    has to: it trains dense fp32 deltas beside the frozen base (`DeltaMagnitude`'s warm-up, with AdamW's betas 0.9 and
    0.95), takes the gradients before they are clipped, and rewinds every bit. Costs 16 bytes a targeted entry
    while it lasts.

    Raises:
        ValueError: `n_iterations` or `l1` is set, which are LT-SFT's.
    """

    warmup_lr: PositiveFloat = 9.65e-6
    """First learning rate of the warm-up (SMT: 9.65e-6 to 9.865e-6), which falls linearly to 0."""
    score: BlockScore = "abs_of_mean"
    """What of a block's sum ranks it; see the table above."""
    block_size: PositiveInt = 256
    """Side of a block, as the config's `block_size`."""

    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    collects_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_iterations == 1, self, "n_iterations", "1: blocks are chosen once")
        require(self.l1 == 0, self, "l1", "0: a pull would be no part of the gradient")

    @property
    def _blocks(self) -> BlockGradient:
        return BlockGradient(score=self.score, block_size=self.block_size, largest=self.largest)

    def check_grid(self, grid: UnitGrid, name: str) -> None:
        """Raises `ValueError` as `BlockGradient.check_grid`."""
        self._blocks.check_grid(grid, name)

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """Sums at zero."""
        return self._blocks.start(rows, cols, device)

    def reduce(self, gradient: Tensor) -> Tensor:
        """As `BlockGradient.reduce`."""
        return self._blocks.reduce(gradient)

    def scores(self, state: State, grid: UnitGrid, weight: Tensor | None = None) -> Chunks:
        """Score chunks of all blocks."""
        return self._blocks.scores(state, grid, weight)
