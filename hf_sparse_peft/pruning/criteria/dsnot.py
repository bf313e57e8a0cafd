"""DSnoT: a pruning mask that is refined without training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...utils.option_types import NonNegativeFloat, NonNegativeInt
from ...utils.parts import register_part
from ..reading.input_statistics import MEANS, SQUARES, InputStatistics
from .gqsa import Groups
from .one_shot_methods import PruningMethod, Wanda
from .pruning_patterns import NM, PruningPattern


@register_part("dsnot")
@dataclass(frozen=True)
class DSnoT(PruningMethod):
    r"""Swaps a kept and a removed weight of each row, cycle by cycle, so that the row's expected output error
    :math:`\epsilon_i = \sum_{j\ \mathrm{removed}} w_{ij} m_j` moves towards 0 (Zhang et al., 2024; official code
    zyxxmu/DSnoT).

    Of the weights that `initial` removed the one with the largest :math:`w_{ij} m_j / v_j^p` of the error's sign
    returns; of those that it kept, the one with the smallest Wanda score goes whose contribution :math:`w_{ij} m_j` has
    the sign opposite to that of :math:`\epsilon_i` (as released; a returned weight never goes again, nor the other way
    round). A row stops at its first refused swap: :math:`|\epsilon_i| \le` `threshold`, no candidate left, or, with
    `same_sign`, an error whose sign would differ from the first one's. Of a pattern, the swap stays inside the group of
    neighbours, the score is that of `initial`, and `same_sign` always holds, as released.

    `m_j` is the sum over tokens divided by the number of sequences, so `threshold` is in units of a sequence's length.
    Weights that stay do not change; the count of each row does not change.
    """

    initial: PruningMethod = field(default_factory=Wanda)
    """What chooses the first mask by scores; not a method that changes weights."""
    cycles: NonNegativeInt = 50
    """Swaps of a row at most."""
    threshold: NonNegativeFloat = 0.1
    """Error below which a row is left alone."""
    power: NonNegativeFloat = 1.0
    """Exponent of the inputs' variance when weights return."""
    same_sign: bool = False
    """Whether a swap may not change the error's sign; the released script's default, though its help says otherwise."""
    sign_in_groups: bool = True
    """Of a pattern, whether the sign of what goes counts there too, as in the paper's equation. False as released: the
    smallest score of the group goes whatever its sign, and the error may grow."""

    reads: ClassVar[frozenset[str]] = frozenset({SQUARES, MEANS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial.changes_weights:
            raise ValueError(
                f"DSnoT.initial={self.initial!r} changes the weights that stay, and DSnoT refines a mask of weights as "
                "they were. Take Wanda() or MagnitudePruning()."
            )
        if type(self.initial).scores is PruningMethod.scores:
            raise ValueError(
                f"DSnoT.initial={self.initial!r} scores no entries, and scores order what goes. Take Wanda() or "
                "MagnitudePruning()."
            )

    def all_reads(self) -> frozenset[str]:
        """Its own and those of `initial`."""
        return self.reads | self.initial.all_reads()

    def prune(
        self,
        weight: Tensor,
        inputs: InputStatistics,
        sparsity: float,
        pattern: PruningPattern,
        name: str = "",
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See `PruningMethod`."""
        if isinstance(pattern, Groups):
            raise ValueError(f"DSnoT swaps single entries, and pattern={pattern} keeps or removes whole groups.")
        gone = self.initial.prune(weight, inputs, sparsity, pattern, name, seed)[1]
        if self.cycles:
            grouped = isinstance(pattern, NM)
            ranking = self.initial if grouped else Wanda()
            swaps = _Swaps(
                contribution=weight * inputs.mean(),
                growth=weight * inputs.mean() / inputs.variance().clamp_min(1e-12) ** self.power,
                keeping=ranking.scores(weight, inputs, name, seed),
                gone=gone,
                group=pattern.of if grouped else None,
                signed=self.sign_in_groups or not grouped,
            )
            gone = swaps.run(self.cycles, self.threshold, self.same_sign or grouped)
        return weight.masked_fill(gone, 0), gone


class _Swaps:
    """The state of all rows: `[rows, cols]` each, candidates that were swapped are no candidates again."""

    def __init__(
        self, contribution: Tensor, growth: Tensor, keeping: Tensor, gone: Tensor, group: int | None, signed: bool
    ) -> None:
        self.contribution, self.growth, self.keeping = contribution, growth, keeping
        self.group, self.signed = group, signed
        self.gone = gone.clone()
        self.may_return, self.may_go = gone.clone(), ~gone
        self.error = contribution.masked_fill(~gone, 0).sum(1)

    def run(self, cycles: int, threshold: float, same_sign: bool) -> Tensor:
        """The mask after at most `cycles` swaps a row."""
        sign = self.error.sign()
        active = torch.ones_like(self.error, dtype=torch.bool)
        rows = torch.arange(len(active), device=active.device)
        for _ in range(cycles):
            entering, found = self._entering()
            leaving, has = self._leaving(entering)
            error = self.error + self.contribution[rows, leaving] - self.contribution[rows, entering]
            active &= found & has & (self.error.abs() > threshold)
            if same_sign:
                active &= error.sign() == sign
            if not active.any():
                break
            at = rows[active]
            self.gone[at, entering[active]] = False
            self.gone[at, leaving[active]] = True
            self.may_return[at, entering[active]] = False
            self.may_go[at, leaving[active]] = False
            self.error = torch.where(active, error, self.error)
        return self.gone

    def _entering(self) -> tuple[Tensor, Tensor]:
        """The removed weight of each row that returns, `[rows]`, and whether there is one."""
        towards = torch.where(self.error > 0, 1.0, -1.0)[:, None]
        candidates = self.may_return & (self.contribution * towards > 0)
        return self._first(self.growth * towards, candidates, largest=True)

    def _leaving(self, entering: Tensor) -> tuple[Tensor, Tensor]:
        """The kept weight of each row that goes for it."""
        candidates = self.may_go
        if self.signed:
            towards = torch.where(self.error < 0, 1.0, -1.0)[:, None]
            candidates = candidates & (self.contribution * towards > 0)
        if self.group is not None:
            columns = torch.arange(self.gone.shape[1], device=entering.device)
            candidates = candidates & (columns // self.group == (entering // self.group)[:, None])
        return self._first(self.keeping, candidates, largest=False)

    @staticmethod
    def _first(values: Tensor, candidates: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
        """The best candidate of each row; of equals the earlier one."""
        worst = float("-inf") if largest else float("inf")
        ranked = values.masked_fill(~candidates, worst)
        best = ranked.argmax(1) if largest else ranked.argmin(1)
        return best, candidates.any(1)
