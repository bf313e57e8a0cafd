"""Masks that an adapter starts with, chosen in one shot: of the base's weights, or with their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...sparsity import Activation, Statistic, lowest_of_rows, n_of_m_mask
from ...utils.option_types import PositiveFraction, PositiveInt
from ...utils.parts import Part, register_part, require


@dataclass(frozen=True)
class MaskStart(Part):
    r"""Base of the one-shot criteria. Of what competes exactly `int(sparsity * n)` of n entries are removed, those with
    the lowest scores; of equals the earlier one. With `n_of_m` so many of every few neighbours along the inputs are
    kept instead. The base stays as it is: the mask acts on it until the adapter is merged."""

    part_kind: ClassVar[str] = "mask_start"
    by_row: ClassVar[bool] = False
    """Whether the entries of an output row compete, or those of the whole weight."""

    sparsity: PositiveFraction = 0.5
    """Fraction of the entries that are removed, below 1."""
    n_of_m: tuple[PositiveInt, PositiveInt] | None = None
    """`(2, 4)` keeps 2 of every 4; `sparsity` plays no part then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sparsity < 1, self, "sparsity", "a fraction above 0 and below 1")
        fits = self.n_of_m is None or self.n_of_m[0] < self.n_of_m[1]
        require(fits, self, "n_of_m", "(kept, of) with fewer kept than there are")

    @property
    def statistic(self) -> Statistic | None:
        """What is read of data; None: nothing."""
        return None

    def scores(self, weight: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        """What ranks the entries of `weight` `[out, in]`, fp32: the highest are kept. `state` is the statistic's, None
        where the data says nothing."""
        raise NotImplementedError

    def kept(self, weight: Tensor, state: dict[str, Tensor] | None, name: str) -> Tensor:
        """The mask, bool `[out, in]`.

        Raises:
            ValueError: groups of `n_of_m` do not divide the inputs of the module `name`.
        """
        scores = self.scores(weight.float(), state)
        if self.n_of_m is not None:
            if weight.shape[1] % self.n_of_m[1]:
                raise ValueError(
                    f"n_of_m={self.n_of_m}: groups of {self.n_of_m[1]} do not divide the {weight.shape[1]} inputs of "
                    f"'{name}'. Choose others, or name the module in exclude_modules."
                )
            return n_of_m_mask(scores, *self.n_of_m)
        grouped = scores if self.by_row else scores.reshape(1, -1)
        return lowest_of_rows(grouped, int(grouped.shape[1] * self.sparsity)).logical_not_().view(scores.shape)


@register_part("magnitude")
@dataclass(frozen=True)
class MagnitudeMask(MaskStart):
    """The smallest :math:`|w|` of a whole weight are removed."""

    def scores(self, weight: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        """:math:`|w|`."""
        return weight.abs()


@register_part("wanda")
@dataclass(frozen=True)
class WandaMask(MaskStart):
    r"""The smallest :math:`|w_{ij}| \|x_j\|_2` of each output row are removed (Wanda; Sun et al., 2024). Norms are
    those of the dense model's inputs, read by calibration in one pass; `pruning.prune_model` reads those that the
    pruned blocks before give."""

    examples: PositiveInt = 128
    """Examples that the norms are read from."""

    by_row: ClassVar[bool] = True

    @property
    def statistic(self) -> Statistic:
        """Sums of squares of the inputs."""
        return Activation(examples=self.examples)

    def scores(self, weight: Tensor, state: dict[str, Tensor] | None) -> Tensor:
        """See the class; without data the magnitude."""
        return weight.abs() if state is None else weight.abs() * state["input"].sqrt()
