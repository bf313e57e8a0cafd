"""`Merge`: a method of merging as a row of parts, and what it makes of the updates of one weight after another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..tuners.shared.pieces import Piece
from ..utils.option_types import NonNegativeInt
from ..utils.parts import Part, register_part, require
from .consensus import Consensus, Everyone, Normalise, Undivided
from .deltas import Deltas, Scan
from .rescale import Rescale, Unscaled
from .sparsify import KeepAll, Sparsify


@dataclass(frozen=True)
class Update:
    """What was merged, for one weight."""

    name: str
    """Name of the module."""
    shape: tuple[int, int]
    """`(out, in)`."""
    positions: Tensor | None
    """int64 `[u]`, sorted row-major positions; None: all entries of the weight."""
    values: Tensor
    """`[u]`."""

    def dense(self) -> Tensor:
        """`[out, in]`."""
        if self.positions is None:
            return self.values.view(self.shape)
        found = self.values.new_zeros(self.shape[0] * self.shape[1])
        found[self.positions] = self.values
        return found.view(self.shape)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Sorted positions and values of the entries that are not 0."""
        at = self.values.nonzero().squeeze(1)
        return at if self.positions is None else self.positions[at], self.values[at]


@dataclass(frozen=True)
class MergeMethod(Part):
    """Base of the methods: how several adapters become one."""

    part_kind: ClassVar[str] = "merge_method"

    def check(self, adapters: int, weights: Sequence[float], importance: bool) -> None:
        """Refuse a number of adapters, weights or a lack of data that the method cannot work with.

        Raises:
            ValueError: names the option.
        """

    def results(
        self, pieces: Mapping[str, list[list[Piece]]], shapes: Mapping[str, tuple[int, int]], weights: Sequence[float]
    ) -> Iterator[tuple[str, list[Piece]]]:
        """Module after module what is merged, at most one `LowRank` of scale 1 and one `Entries` each, for a method
        that works on `pieces`, a list for each adapter; a `Merge` works on updates instead."""
        raise NotImplementedError


@register_part("merge")
@dataclass(frozen=True)
class Merge(MergeMethod):
    r"""Entry by entry, for adapters with the weights :math:`w_t`,

    .. math::
        \tau = \lambda\,\frac{\sum_t w_t\,s_t\,\tau'_t}{d}, \qquad
        \tau'_t = \mathrm{rescale}(\mathrm{sparsify}(\tau_t))

    where `consensus` gives the shares s and `normalise` the divisor d. Each of the four is a part that anybody can
    register. Sums and votes are taken in fp32.

    With every part at its default this is the sum :math:`\lambda \sum_t w_t \tau_t` (task arithmetic), which is taken
    of pieces: supports add on their union, factors are put side by side, and nothing is approximated.
    """

    sparsify: Sparsify = field(default_factory=KeepAll)
    """Which entries of each adapter take part."""
    rescale: Rescale = field(default_factory=Unscaled)
    """What their values are multiplied by."""
    consensus: Consensus = field(default_factory=Everyone)
    """With what share each adapter goes into an entry."""
    normalise: Normalise = field(default_factory=Undivided)
    """What the sum is divided by."""
    scale: float = 1.0
    r""":math:`\lambda`."""
    weights: tuple[float, ...] | None = None
    """Weights that belong to the method, in the order of its adapters; None: the caller's, or ones."""
    missing: Literal["absent", "zero"] = "absent"
    """What an entry is that an adapter does not hold: no part of its rankings, counts and draws, or a 0 that is, as in
    the dense vectors of papers and their code, where fractions are of the whole weight."""
    same_support: bool = False
    """Whether adapters must hold the same entries, so that a mean is as sparse as each of them; others are refused."""
    seed: NonNegativeInt = 0
    """Of all draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.sparsify.draws or not self.rescale.needs_draw
        require(fits, self, "rescale", f"a part that needs no draw: sparsify={self.sparsify} has none")

    def check(self, adapters: int, weights: Sequence[float], importance: bool) -> None:
        """Raises `ValueError` for weights or data that do not fit."""
        if self.weights is not None and len(self.weights) != adapters:
            raise ValueError(
                f"This method merges {len(self.weights)} adapters in a given order; {adapters} were given."
            )
        if self.normalise.positive_weights and (min(weights) < 0 or not sum(weights) > 0):
            raise ValueError(
                f"weights={list(weights)}: {self.normalise.part_type!r} divides by sums of them, so none may be below "
                "0 and not all 0."
            )
        if self.consensus.needs_importance and not importance:
            raise ValueError(
                f"importance=None: {self.consensus.part_type!r} goes by an importance of entries. Measure it with "
                "merging.fisher_importance(model, data), one for each adapter, and pass importance=[...]."
            )

    def coefficients(self, weights: Sequence[float]) -> list[float] | None:
        """What each adapter's update is multiplied by, where the merge is a weighted sum of them; None else."""
        plain = isinstance(self.sparsify, KeepAll) and isinstance(self.rescale, Unscaled)
        if not (plain and isinstance(self.consensus, Everyone)):
            return None
        w = torch.tensor(list(weights), dtype=torch.float64)
        divisor = self.normalise(torch.ones(len(w), 1, dtype=torch.float64), w)
        return (self.scale * w / torch.as_tensor(divisor, dtype=torch.float64)).tolist()

    def updates(self, scan: Scan, weights: Sequence[float]) -> Iterator[Update]:
        """The merged update of one weight after another."""
        if self.missing == "zero":
            scan = scan.mapped(Deltas.filled)
        plan = self.sparsify.prepare(scan, self.seed)
        thinned = scan.mapped(lambda deltas: self.rescale(deltas, self.sparsify(deltas, plan, self.seed)))
        agreed = self.consensus.prepare(thinned, weights)
        for deltas in thinned:
            yield self._merged(deltas, weights, agreed)

    def _merged(self, deltas: Deltas, weights: Sequence[float], plan: object) -> Update:
        w = deltas.values.new_tensor(list(weights))
        found = self.consensus(deltas, w, plan)
        total = (w[:, None] * found.shares * found.values).sum(0)
        divisor = self.normalise(found.shares, w)
        divisor = torch.as_tensor(divisor, dtype=total.dtype).expand_as(total)
        merged = torch.where(divisor != 0, total / torch.where(divisor != 0, divisor, 1.0), 0.0)
        return Update(deltas.name, deltas.shape, deltas.positions, merged * self.scale)


def warn_of_supports(name: str) -> None:
    """Tell that a mean is taken of adapters with other supports."""
    warnings.warn(
        f"The adapters hold other entries than each other, e.g. in '{name}': an entry of one adapter alone is scaled "
        "down by its weight, since the others are 0 (the base's own) there, and the mean is denser than each. Train "
        "them on one support, or take a method that does not dilute (ties, holders).",
        stacklevel=5,  # no_grad is a caller too
    )
