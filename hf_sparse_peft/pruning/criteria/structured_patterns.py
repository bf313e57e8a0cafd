"""Patterns whose zeros come in whole units: channels, heads, rows, tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...sparsity import lowest_of_rows
from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ..units.structure import CHANNELS, HEADS, Kind
from .pruning_patterns import PruningPattern


@register_part("rows")
@dataclass(frozen=True)
class Rows(PruningPattern):
    """Whole rows go, of every block as many.

    Coupled, the default: intermediate channels of the feed-forward part. A channel owns a row of gate and up, with its
    entry of the bias, and a column of down; `int(sparsity * channels)` of each block go, from all three. Not coupled:
    `int(sparsity * rows)` output rows of every linear weight by itself, scored by the norm of a row's scores; biases
    stay, and nothing can be sliced away.
    """

    coupled: bool = True
    """Whether rows go as intermediate channels, from all weights that a channel reaches."""

    whole_units: ClassVar[bool] = True

    @property
    def kind(self) -> Kind | None:
        """See `PruningPattern`."""
        return CHANNELS if self.coupled else None

    def removed(self, scores: Tensor, sparsity: float, group: str) -> Tensor:
        """See `PruningPattern`; `group` has no say."""
        norms = scores.square().sum(1)
        return lowest_of_rows(norms[None], int(len(norms) * sparsity)).view(-1, 1).expand_as(scores)


@register_part("heads")
@dataclass(frozen=True)
class Heads(PruningPattern):
    """Attention heads go, `int(sparsity * heads)` of every block: their rows of query, key and value, with the biases'
    entries, and their columns of the output projection. Under grouped-query attention a unit is a key and value head
    with all query heads that read it."""

    whole_units: ClassVar[bool] = True
    kind: ClassVar[Kind | None] = HEADS


@register_part("blocks")
@dataclass(frozen=True)
class Blocks(PruningPattern):
    """Tiles of `rows` x `cols` neighbours of every weight `[out, in]` go whole, `int(sparsity * tiles)` of each weight,
    scored by the norm of a tile's scores. (Whole transformer blocks: `drop_blocks`.)"""

    rows: PositiveInt = 16
    """Neighbouring outputs of a tile."""
    cols: PositiveInt = 16
    """Neighbouring inputs of a tile."""

    whole_units: ClassVar[bool] = True

    def check(self, rows: int, cols: int, name: str) -> None:
        """Raises `ValueError` where tiles run over an edge."""
        if rows % self.rows or cols % self.cols:
            raise ValueError(
                f"pattern={self}: tiles of {self.rows} x {self.cols} do not divide the {rows} x {cols} weight of "
                f"'{name}'. Choose another size, or name the module in exclude_modules."
            )

    def removed(self, scores: Tensor, sparsity: float, group: str) -> Tensor:
        """See `PruningPattern`; `group` has no say."""
        rows, cols = scores.shape[0] // self.rows, scores.shape[1] // self.cols
        norms = scores.view(rows, self.rows, cols, self.cols).square().sum((1, 3)).flatten()
        gone = lowest_of_rows(norms[None], int(len(norms) * sparsity)).view(rows, 1, cols, 1)
        return gone.expand(rows, self.rows, cols, self.cols).reshape(scores.shape)
