"""Where zeros may lie when a weight is pruned: anywhere, or so many of every few neighbours along the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ...sparsity import lowest_of_rows, n_of_m_mask
from ...utils.option_types import PositiveInt
from ...utils.parts import Part, register_part, require


class PruningPattern(Part):
    """Which entries of a weight compete with one another for being kept."""

    part_kind: ClassVar[str] = "pruning_pattern"
    whole_units: ClassVar[bool] = False
    """Whether what goes are units of several entries, so that methods which judge single entries have no say."""
    kind: ClassVar[str | None] = None
    """Units of a block that go from several weights at once, "heads" or "channels"; None: each weight by itself."""

    def fixed_sparsity(self) -> float | None:
        """The fraction of zeros that the pattern itself fixes; None where it is free."""
        return None

    def check(self, rows: int, cols: int, name: str) -> None:
        """Raises `ValueError` where a weight of that shape cannot be cut so."""

    def removed(self, scores: Tensor, sparsity: float, group: str) -> Tensor:
        """Which entries go: those with the lowest scores of each group, exactly; of equals the earlier one.

        Args:
            scores: `[rows, cols]`, float, what is kept first ranking highest.
            sparsity: fraction that goes.
            group: "row" or "layer", the criterion's own choice of what competes.

        Returns:
            bool `[rows, cols]`.
        """
        raise NotImplementedError


@register_part("unstructured")
@dataclass(frozen=True)
class Unstructured(PruningPattern):
    """Zeros anywhere: exactly `int(sparsity * n)` of the `n` entries that compete."""

    group: Literal["row", "layer"] | None = None
    """Entries of each output row compete, or all of a weight. None: as the criterion's paper has it (Wanda: rows)."""

    def removed(self, scores: Tensor, sparsity: float, group: str) -> Tensor:
        """See `PruningPattern`."""
        grouped = scores if (self.group or group) == "row" else scores.reshape(1, -1)
        return lowest_of_rows(grouped, int(grouped.shape[1] * sparsity)).view(scores.shape)


@register_part("n_of_m")
@dataclass(frozen=True)
class NM(PruningPattern):
    """At most `keep` of every `of` neighbours along the inputs are kept, 2 of 4 by default. (Some scripts write n:m
    for what is removed; 2:4 is the same either way.)"""

    keep: PositiveInt = 2
    """Entries kept of each group."""
    of: PositiveInt = 4
    """Neighbours along the inputs that make a group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.keep < self.of, self, "keep", f"fewer than of={self.of}")

    def fixed_sparsity(self) -> float:
        """`1 - keep / of`."""
        return 1 - self.keep / self.of

    def check(self, rows: int, cols: int, name: str) -> None:
        """Raises `ValueError` where groups run over the end of a row."""
        if cols % self.of:
            raise ValueError(
                f"pattern={self}: groups of {self.of} do not divide the {cols} inputs of '{name}'. Choose another "
                "pattern, or name the module in exclude_modules."
            )

    def removed(self, scores: Tensor, sparsity: float, group: str) -> Tensor:
        """See `PruningPattern`; `group` has no say."""
        return ~n_of_m_mask(scores, self.keep, self.of)
