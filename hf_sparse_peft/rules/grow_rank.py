"""`GrowRank`: modules that matter are given further ranks while they train (IncreLoRA)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..sparsity import AverageRank, Budget
from ..utils.option_types import NonNegativeFloat, NonNegativeInt, PositiveInt
from ..utils.parts import register_part
from .entering import EnteringRate, OwnClock
from .moves import move_units
from .no_effect import report_unfinished
from .rule import RankRule
from .run import Run
from .scores import ModuleSensitivity, Smoothed, TrainingScore
from .space import UnitSpace


@register_part("grow_rank")
@dataclass(frozen=True)
class GrowRank(RankRule):
    r"""Ranks `R` that grow where they matter, :math:`\Delta W = \frac{\alpha}{R + 10^{-5}} B\,\mathrm{diag}(E) A`, with
    the gate `E` (IncreLoRA; Zhang et al., 2023). A module starts with one component, or with those it was trained with.

    After update `t` (from 0), :math:`t > t_{warm}` a multiple of `every`, the `modules` with the best scores get
    `grow_by` components each. The next `grow_by` components of a module are its reserve: their factors train with a
    small fixed gate, in the score too; evaluation and files are without.

    Departs from the released code: no module grows beyond `config.r`, which is allocated, and rounds never overshoot;
    scores are of all micro-batches and ranks; `Orthogonality` counts components beyond the reserve, held still as they
    are. Growing after the optimizer's step changes nothing: what enters has no gradient yet.
    """

    budget: Budget = field(default_factory=lambda: AverageRank(2))
    """What lives at the end: `AverageRank(r)`, `Numbers(n)`, `Fraction(f)` of what is allocated."""
    modules: PositiveInt = 3
    """Modules that grow at a time (released code: 2 to 22 by task)."""
    grow_by: PositiveInt = 1
    """Components that one gets (released code: half of the average rank at the end)."""
    every: PositiveInt = 100
    """Optimizer steps between two growths."""
    warmup: NonNegativeInt = 100
    """Steps before the first, which comes at the next multiple of `every`."""
    reserve_gate: NonNegativeFloat = 1e-5
    """Gate of the reserve, and of components that enter. 0: the reserve does not train (no advance learning)."""
    score: TrainingScore = field(default_factory=lambda: Smoothed(ModuleSensitivity()))
    """How much a module matters. `Smoothed()`, from the gradients of factors and gate, needs no dense gradient."""
    entering_lr: EnteringRate = field(default_factory=OwnClock)
    """Learning rate of what begins to train: `OwnClock()`, `ConstantRate()` or the run's, `RunRate()`."""

    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "trains"})

    def begin(self, run: Run) -> None:
        """Let one component of each module live, and hold still what is not revealed yet."""
        for space in run.all_spaces:
            if not run.resumed and not space.gate.any():
                move_units(space, torch.arange(1, device=space.gate.device), run.optimizer)
        run.memory.left = self.budget.left(run.all_spaces)
        run.train_units(lambda *of: self._trained(run, *of), self.entering_lr)
        costs = sorted(map(self.budget.cost, run.all_spaces))[: self.modules]
        rounds = -(-run.memory.left // (self.grow_by * sum(costs)))
        cause = f"GrowRank.budget={self.budget}, every={self.every} and modules={self.modules} take growths"
        report_unfinished(run, self.warmup, self.every, rounds, cause, "Raise modules, or lower every.")

    def _reserve(self, run: Run, space: UnitSpace) -> Tensor:
        """Components that enter next, bool `[r]`; none in the first step, and at the target."""
        return space.entering(self.grow_by if run.step and run.memory.left else 0)

    def _trained(self, run: Run, space: UnitSpace, parameter: nn.Parameter) -> Tensor:
        in_advance = self.reserve_gate and parameter is not space.gate
        return (space.mask != 0) | self._reserve(run, space) if in_advance else space.mask != 0

    def before_step(self, run: Run) -> None:
        """Scale by the current rank, add the reserve, and read what the score needs while ranks grow."""
        run.for_this_step(s.scaled_by_rank(self._reserve(run, s), self.reserve_gate, 1e-5) for s in run.all_spaces)
        self.score.before_step(run, run.all_spaces if run.memory.left else [])

    def after_update(self, run: Run) -> None:
        """Update the scores, and grow where it is due."""
        spaces = [s for s in run.spaces() if run.memory.left and s.count < s.size and not run.step_skipped]
        self.score.update(run, spaces)
        if not spaces or run.step <= self.warmup or run.step % self.every:
            return
        judged = run.with_evidence(spaces, self.score.has_evidence, "the rank did not grow")
        for space in sorted(judged, key=self.score.module_score, reverse=True)[: self.modules]:
            enters = space.entering(min(self.grow_by, run.memory.left // self.budget.cost(space)))
            move_units(space, ((space.mask != 0) | enters).nonzero().squeeze(1), run.optimizer)
            run.memory.left = self.budget.left(run.all_spaces)
        run.record(alive=sum(space.count for space in run.all_spaces))
