"""How adapters agree on an entry: with what share each adapter's value goes into the merged one, and what the sum of
these is divided by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..utils.option_types import NonNegativeFloat
from ..utils.parts import Part, register_part
from .deltas import Deltas, Scan


@dataclass(frozen=True)
class Agreement:
    """What adapters bring to the entries of one weight."""

    values: Tensor
    """`[n, u]`."""
    shares: Tensor
    """`[n, u]`, at least 0; 0 leaves an adapter's value out."""


@dataclass(frozen=True)
class Consensus(Part):
    """Base of the ways to agree; the merged entry is the sum of weight x share x value over adapters, divided as
    `Normalise` says."""

    part_kind: ClassVar[str] = "consensus"
    needs_importance: ClassVar[bool] = False
    """Whether it goes by an importance of entries that is measured on data (`merge_adapters(importance=...)`)."""

    def prepare(self, scan: Scan, weights: Sequence[float]) -> Any:
        """What must be known of all weights before the first is merged, from passes over the updates as they were
        thinned; None by default."""

    def __call__(self, deltas: Deltas, weights: Tensor, plan: Any) -> Agreement:
        """Agree on one weight. `weights`: `[n]`; `plan` is what `prepare` gave."""
        raise NotImplementedError


@register_part("everyone")
@dataclass(frozen=True)
class Everyone(Consensus):
    """Every adapter counts everywhere: where it holds nothing its value is 0, the base's own."""

    def __call__(self, deltas: Deltas, weights: Tensor, plan: Any) -> Agreement:
        """Shares of 1."""
        return Agreement(deltas.values, torch.ones_like(deltas.values))


@register_part("holders")
@dataclass(frozen=True)
class Holders(Consensus):
    """Only adapters that hold an entry count there: divided by their number this is no soup, since entries of one
    adapter alone come in whole."""

    def __call__(self, deltas: Deltas, weights: Tensor, plan: Any) -> Agreement:
        """Shares of 1 where an entry is held."""
        return Agreement(deltas.values, deltas.held.to(deltas.values.dtype))


@register_part("elected_sign")
@dataclass(frozen=True)
class ElectedSign(Consensus):
    r"""Adapters vote on the sign of each entry, :math:`\gamma = \mathrm{sign}(\sum_t \tau_t)`, and those of that sign
    take part (TIES; Yadav et al., 2023). Who holds nothing, or 0, neither votes nor takes part, so that an entry of one
    adapter alone comes in whole."""

    vote: Literal["total", "frequency"] = "total"
    r"""`total` sums values, `frequency` signs."""
    weighted: bool = False
    """Whether votes have the adapters' weights (mergekit, DELLA), or all count alike (TIES, peft)."""
    tie: Literal["majority", "plus", "minus"] = "majority"
    """Where the sum is 0: the sign of most entries of the model, as the authors' code (minus if these tie too), or
    always one (peft, mergekit: plus)."""

    def prepare(self, scan: Scan, weights: Sequence[float]) -> float:
        """The sign that ties take: +1 or -1; one pass over the model to count signs for `majority`."""
        if self.tie != "majority":
            return 1.0 if self.tie == "plus" else -1.0
        balance = 0
        for deltas in scan:
            balance += int(self._total(deltas, deltas.values.new_tensor(list(weights))).sign().sum())
        return 1.0 if balance > 0 else -1.0

    def __call__(self, deltas: Deltas, weights: Tensor, plan: float) -> Agreement:
        """Shares of 1 for those of the elected sign."""
        elected = self._total(deltas, weights).sign()
        elected = torch.where(elected == 0, plan, elected)
        return Agreement(deltas.values, (deltas.values.sign() == elected).to(deltas.values.dtype))

    def _total(self, deltas: Deltas, weights: Tensor) -> Tensor:
        votes = deltas.values.sign() if self.vote == "frequency" else deltas.values
        return ((weights[:, None] * votes) if self.weighted else votes).sum(0)


@register_part("by_importance")
@dataclass(frozen=True)
class ByImportance(Consensus):
    r"""Shares are the Fisher information of an entry, :math:`\frac{\sum_j c_j F_j \tau_j}{\sum_j c_j F_j}` (Fisher
    merging; Matena and Raffel, 2022). Where an adapter holds nothing its F is 0, so that the holder's value stands;
    where all are 0 the result is 0."""

    normalise: bool = True
    """Whether each adapter's F is divided by its L2 norm over the model, so that none leads by the size of its
    gradients."""
    floor: Literal["none", "first", "all"] = "none"
    """Who has at least `floor_value`: nobody, the first adapter (the authors' favoured target model), or all."""
    floor_value: NonNegativeFloat = 1e-6
    """The least F there."""

    needs_importance: ClassVar[bool] = True

    def prepare(self, scan: Scan, weights: Sequence[float]) -> list[float]:
        """The L2 norm of each adapter's F, by one pass over the model; ones without `normalise`.

        Raises:
            ValueError: an adapter whose F is 0 or not finite everywhere, which no norm mends.
        """
        if not self.normalise:
            return [1.0] * scan.adapters
        squares = sum(
            (self._shares(deltas).double().square().sum(1) for deltas in scan),
            torch.zeros(scan.adapters, dtype=torch.float64),
        )
        norms = squares.sqrt().tolist()
        odd = next((at for at, norm in enumerate(norms) if not 0 < norm < float("inf")), None)
        if odd is not None:
            raise ValueError(
                f"The importance of adapter {odd} has the norm {norms[odd]:g} over all weights: no entry of it was "
                "measured. Measure it on data that reach the adapter, or set normalise=False."
            )
        return norms

    def __call__(self, deltas: Deltas, weights: Tensor, plan: list[float]) -> Agreement:
        """Shares of F."""
        return Agreement(deltas.values, self._shares(deltas) / weights.new_tensor(plan)[:, None])

    def _shares(self, deltas: Deltas) -> Tensor:
        shares = deltas.importance * deltas.held
        floored = {"none": 0, "first": 1, "all": len(shares)}[self.floor]
        shares[:floored] = shares[:floored].clamp_min(self.floor_value)
        return shares


@dataclass(frozen=True)
class Normalise(Part):
    """Base of what the weighted sum of shares x values is divided by."""

    part_kind: ClassVar[str] = "normalise"
    positive_weights: ClassVar[bool] = False
    """Whether weights below 0 would make the divisor meaningless."""

    def __call__(self, shares: Tensor, weights: Tensor) -> Tensor | float:
        """Shares `[n, u]`, weights `[n]` -> `[u]`, or one number. The result is 0 where it is 0."""
        raise NotImplementedError


@register_part("undivided")
@dataclass(frozen=True)
class Undivided(Normalise):
    """The sum itself (task arithmetic)."""

    def __call__(self, shares: Tensor, weights: Tensor) -> float:
        """1."""
        return 1.0


@register_part("all_weights")
@dataclass(frozen=True)
class AllWeights(Normalise):
    """The sum of all adapters' weights, wherever they take part: a weighted mean of models (soups)."""

    positive_weights: ClassVar[bool] = True

    def __call__(self, shares: Tensor, weights: Tensor) -> float:
        """One number."""
        return float(weights.sum())


@register_part("agreeing")
@dataclass(frozen=True)
class Agreeing(Normalise):
    """The sum of the shares, of weights that do not matter here: the number of adapters that take part where shares are
    0 or 1 (TIES and peft), the sum of scores in PCB-Merging."""

    def __call__(self, shares: Tensor, weights: Tensor) -> Tensor:
        """`[u]`."""
        return shares.sum(0)


@register_part("agreeing_weights")
@dataclass(frozen=True)
class AgreeingWeights(Normalise):
    """The sum of weight x share (mergekit, DELLA, Fisher merging)."""

    positive_weights: ClassVar[bool] = True

    def __call__(self, shares: Tensor, weights: Tensor) -> Tensor:
        """`[u]`."""
        return (weights[:, None] * shares).sum(0)
