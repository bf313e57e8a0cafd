"""`Allocate`: one budget for the units of all layers, and for several kinds of units at once."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..sparsity import Budget, Cubic, Curve, affordable, competition_counts, stream_seed, whole_steps
from ..utils.option_types import PositiveInt, Range
from ..utils.parts import UnknownPart, register_part, require
from .collectives import all_reduce_mean
from .moves import move_units
from .no_effect import report_idle
from .rule import Rule
from .run import Run
from .scores import Smoothed, TrainingScore
from .space import UnitSpace
from .training_budget import budget_of_training


@register_part("allocate")
@dataclass(frozen=True)
class Allocate(Rule):
    r"""Allocates a budget to the units of all layers: the best by score live, whatever layer and kind they are of.

    From what the model starts with, :math:`b_0`, to the target :math:`b_T` the budget falls as
    :math:`b_T + (b_0 - b_T)\,c\big(\frac{t - t_i}{T - t_f - t_i}\big)`, cubic by default.

    * `("rank",)` is AdaLoRA (Zhang et al., 2023): components compete over the whole model, and a loser's gate is
      zeroed. Its factors train on, so it may return while the budget falls.
    * `("rank", "support")` is a joint budget of trained numbers: components and entries compete by their score per
      number. Entries that lose leave for good (`move_units`). Whatever leaves makes room for units of the other kind
      and of other layers, so the score alone decides how the target is split: start with more of *both* kinds than the
      target, for the split can only grow one part by cutting the other.
    * `("kernel",)` is SNELLA (Shen et al., 2025): a matrix's number of entries is proportional to its score, none above
      its size (`sparsity.competition_counts`); which entries follows from the kernel.
    * `("row",)` is LoSparse (Li et al., 2023): rows of the sparse part of `LowRankSparse` compete, and a loser is
      zeroed. It trains on, so it may return at the next comparison; at the target it is zeroed after every step.

    Scores are updated after every optimizer step `t`, up to :math:`T - t_f` where `fixed_at_end`. Units are compared at
    multiples of `every` after :math:`t_i`, and at :math:`t = T - t_f` (or the last step) for the target. They are taken
    in the order of their scores, and one that costs more than what is left of the budget is passed over: what is left
    in the end pays for none of the others, so it is less than one unit of the largest. A layer whose units never had a
    gradient keeps them and is named in a warning; the others compete for the budget of their own number.
    Layers that are held still keep what they have and follow when they train again.
    """

    spaces: tuple[str, ...] = ("rank",)
    """Kinds of units that compete for the budget: "rank" and "support" in any combination, or "kernel", or "row"."""
    budget: Budget | None = None
    """What is left at the end: `AverageRank(r)`, `Numbers(n)`, `Density(d)`, `Fraction(f)` of the start, or another
    budget that answers for training (`sparsity.Budget.target`). None: the `budget` of the config, which is what its
    supports start with, for spaces with "support"."""
    score: TrainingScore = field(default_factory=Smoothed)
    """How much each trained number matters."""
    unit_score: Literal["mean", "sum_of_means"] | None = None
    """A unit's score: the mean over all of its numbers, which makes units of different kinds comparable, or as AdaLoRA
    and SNELLA have it the sum of its means over the gate, the row of A and the column of B. None: the mean where there
    are several kinds, else the sum of means."""
    every: PositiveInt | None = 10
    """Optimizer steps between two allocations while the budget falls. None: one allocation for good, right after
    `initial_warmup` (a split once at the start, as RA-SpaRC makes one, but by this score), or at the first step after
    it at which every kind of `spaces` has a score other than 0 somewhere: none has before the first update."""
    initial_warmup: Annotated[float, Range(least=0, below=1)] = 0.1
    """Fraction of the run before the budget starts to fall (t_i / T); scores are collected."""
    final_warmup: Annotated[float, Range(least=0, below=1)] = 0.3
    """Fraction of the run at the end with the target reached (t_f / T)."""
    curve: Curve = field(default_factory=lambda: Cubic(1.0, 0.0))
    """Part of b_0 - b_T that is left, over the progress between both warm-ups."""
    fixed_at_end: bool = True
    """Whether units are fixed in the final warm-up (AdaLoRA), or go on being compared at the target (SNELLA)."""
    count_from: Literal[0, 1] = 1
    """Number of the first optimizer step: 1, as in AdaLoRA's algorithm, or 0, as in its official training loop, where
    all of the above comes one step later."""

    writes: ClassVar[frozenset[str]] = frozenset({"units"})

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = set(self.spaces)
        accepted = "'rank' and 'support' in any combination, or 'kernel' or 'row' alone"
        known = kinds <= {"rank", "support"} or kinds in ({"kernel"}, {"row"})
        require(bool(kinds) and known, self, "spaces", accepted)
        if self.initial_warmup + self.final_warmup >= 1:
            raise ValueError(
                f"Allocate.initial_warmup + final_warmup={self.initial_warmup + self.final_warmup} leave no step for "
                "the budget to fall in; give fractions that sum to less than 1."
            )

    @property
    def acts_on(self) -> frozenset[str]:
        """The kinds of `spaces`."""
        return frozenset(self.spaces)

    @property
    def needs(self) -> frozenset[str]:
        """Components with a gate, matrices with counts of their own."""
        needed = {"rank": "gate", "kernel": "counts"}
        return frozenset(needed[kind] for kind in self.spaces if kind in needed)

    def check(self, config: Any) -> None:
        """Refuse an adapter without these units, and one that starts with less than the budget."""
        missing = self.acts_on - config.unit_kinds
        if missing:
            raise ValueError(
                f"Allocate.spaces={self.spaces} needs units of kind {sorted(missing)}, and the adapter has "
                f"{sorted(config.unit_kinds)}. Set r >= 1 for 'rank', density > 0 for 'support', or other spaces."
            )
        if "support" in self.spaces and config.freezes_units:
            raise ValueError(
                "Allocate takes units of the support away, and another rule keeps units that stopped training (retired "
                "or frozen ones). Keep one of the two."
            )
        if len(self.spaces) > 1 and self.unit_score == "sum_of_means":
            raise ValueError(
                f"Allocate.unit_score={self.unit_score!r} cannot compare units of {self.spaces}: a component would sum "
                "three means, an entry one. Set unit_score='mean'."
            )
        if "gradient" in self.score.needs:
            raise ValueError(
                f"Allocate.score={self.score} has one number for a whole module, and units compete. Take a score of "
                "single numbers: Sensitivity, Magnitude, or Smoothed over one of them."
            )
        if self.budget is not None or not isinstance(getattr(config, "budget", None), UnknownPart):
            self.budget_for(config).check_training(config, self.spaces)

    def budget_for(self, config: Any) -> Budget:
        """`budget`, or the one of the adapter's config.

        Raises:
            ValueError: there is none.
        """
        found = self.budget
        if found is None and "support" in self.spaces:
            found = getattr(config, "budget", None)
        if not isinstance(found, Budget):
            raise ValueError(
                f"Allocate.budget=None takes the budget of a config's supports, and with spaces={self.spaces} and "
                f"budget={getattr(config, 'budget', None)} in the config there is none. Set Allocate.budget to "
                "AverageRank(r), Numbers(n), Density(d) or Fraction(f)."
            )
        return found

    # When

    def window(self, total_steps: int) -> tuple[int, int]:
        """Steps between which the budget falls."""
        final = whole_steps(self.final_warmup, total_steps)
        return whole_steps(self.initial_warmup, total_steps), total_steps - final

    def last_comparison(self, total_steps: int) -> int:
        """The step of the last allocation, at the target; without `fixed_at_end` others follow."""
        first, last = self.window(total_steps)
        return max(first, 1) if self.every is None else min(last, total_steps - 1 + self.count_from)

    def budget_at(self, start: int, target: int, step: int, total_steps: int) -> float:
        """What lives from step `t` on, before rounding."""
        first, last = self.window(total_steps)
        if step <= first:
            return start
        if step > last:
            return target
        return target + (start - target) * self.curve((step - first) / (last - first))

    def _is_due(self, run: Run, step: int) -> bool:
        first = self.window(run.total_steps)[0]
        at_end = self.last_comparison(run.total_steps)
        if self.every is None:
            return step >= at_end and "split" not in run.saved
        if step <= first or step == at_end:
            return step == at_end
        return step % self.every == 0 and (step < at_end or not self.fixed_at_end)

    # In training

    def begin(self, run: Run) -> None:
        """The run must hold an allocation."""
        if not self.fixed_at_end and self.every is not None and self.every > run.total_steps:
            raise ValueError(
                f"Allocate.every={self.every} is longer than the run of {run.total_steps} steps: units would be "
                "compared once at most. Train longer or shorten it."
            )
        run.memory.missed = False
        if not run.resumed:  # a resumed run said it at its start
            self._check_effect(run)

    def _check_effect(self, run: Run) -> None:
        """Say that nothing leaves, or that all of it leaves at one step."""
        spaces = run.spaces(training=False)
        names = [space.name for space in spaces]
        start, target = self._ends(run, spaces, spaces)
        first, last = self.window(run.total_steps)
        counted, cause = spaces[0].counted, None
        if counted and len(spaces) == 1:
            cause = "Allocate has one matrix, which has nothing to compete with: 0 entries ever move"
        elif start == target and (not counted or target == sum(space.size for space in spaces)):
            cause = f"Allocate.budget={self.budget_for(run.config)} is no less than the {start} that {len(names)} "
            cause += "layers start with: 0 units ever leave"
        if cause:
            mend = "Start with more (AdaLoRA: r = 1.5 x the average rank), lower the budget, or leave the rule out."
            report_idle(names, len(names), cause, mend)
        elif self.every is not None and start != target:
            due = [step for step in range(first + 1, last) if step % self.every == 0]
            if not any(step < self.last_comparison(run.total_steps) for step in due):
                warnings.warn(
                    f"Allocate.every={self.every} leaves no allocation while the budget falls (steps {first + 1} to "
                    f"{last} of {run.total_steps}): it jumps to the target at step {last}. Lower every, shorten "
                    "initial_warmup and final_warmup, or train longer.",
                    stacklevel=2,
                )

    def after_update(self, run: Run) -> None:
        """Update the scores from the weights after the step and the gradients before it."""
        step, last = run.step + self.count_from, self.window(run.total_steps)[1]
        collects = step < last if self.every is not None else "split" not in run.saved
        if collects or not self.fixed_at_end:
            self.score.update(run, run.spaces(training=False))

    def after_step(self, run: Run) -> None:
        """Compare what is due, and keep dead components dead once they are fixed."""
        step = run.step - 1 + self.count_from
        due, at_end = self._is_due(run, step), self.last_comparison(run.total_steps)
        all_spaces = run.spaces(training=False)
        training = [space for space in all_spaces if space.trains]
        fixed = self.fixed_at_end and step >= at_end
        # What was held still at the last allocation follows when it trains again.
        late = fixed and step > at_end and not due and len(training) < len(all_spaces)
        judged = [space for space in training if self.score.has_evidence(space)] if due or late else []
        if due and self.every is None:
            due = bool(judged) and {space.kind for space in judged} == {space.kind for space in training}
            run.saved.update({"split": step} if due else {})
        if due or late:
            run.memory.missed = run.memory.missed or len(training) < len(all_spaces)
            run.report_missing([space for space in training if space not in judged], len(judged), self._not_done)
            if judged:
                self._allocate(run, judged, all_spaces, step, late)
        if due or fixed or (step >= at_end and self.spaces == ("row",)):
            for space in training:
                space.apply_mask()

    @property
    def _not_done(self) -> str:
        return f"{' and '.join(self.spaces)} units were not compared"

    def _ends(self, run: Run, spaces: list[UnitSpace], all_spaces: list[UnitSpace]) -> tuple[int, int]:
        budget = self.budget_for(run.config)
        start, target = budget.initial(spaces), budget.target(spaces, all_spaces)
        return start, target if spaces[0].counted else min(target, start)

    def _allocate(self, run: Run, judged: list[UnitSpace], all_spaces: list[UnitSpace], step: int, late: bool) -> None:
        competing = [space for space in all_spaces if space in judged or not space.trains]
        start, target = self._ends(run, competing, all_spaces)
        cost = self.budget_for(run.config).cost
        counted = judged[0].counted
        total = target
        if self.every is not None and step != self.last_comparison(run.total_steps):
            total = self.budget_at(start, target, step, run.total_steps)
        alive = [space.count * cost(space) for space in competing]
        sizes = [space.initial * cost(space) for space in competing]
        sizes = [space.size for space in competing] if counted else sizes
        total = budget_of_training(round(total) if counted else int(total), competing, alive, sizes)
        living = sum(space.count * cost(space) for space in judged)
        if late and total >= living:
            return
        if counted:
            self._resize(run, judged, total)
        else:
            self._choose(run, judged, total, stream_seed(run.seed, "rank allocation", step))
        living = {kind: sum(space.count for space in all_spaces if space.kind == kind) for kind in self.spaces}
        run.record(budget=total, alive=living)

    def _resize(self, run: Run, spaces: list[UnitSpace], total: int) -> None:
        scores = all_reduce_mean(torch.stack([self.scores(space)[0] for space in spaces])).tolist()
        names = [f"{space.name}.{number}" for number, space in enumerate(spaces)]
        sizes = {name: space.size for name, space in zip(names, spaces, strict=True)}
        counts = competition_counts(dict(zip(names, scores, strict=True)), sizes, total)
        for name, space in zip(names, spaces, strict=True):
            space.resize(counts[name])

    def _choose(self, run: Run, spaces: list[UnitSpace], total: int, seed: int) -> None:
        scores = [self.scores(space) for space in spaces]
        numbers = [score.numel() for score in scores]
        cost = self.budget_for(run.config).cost
        costs = torch.cat([torch.full((n,), cost(space)) for n, space in zip(numbers, spaces, strict=True)])
        chosen = affordable(torch.cat([score.cpu() for score in scores]), costs, total, seed)
        for space, lives in zip(spaces, chosen.split(numbers), strict=True):
            units = space.candidates()
            move_units(space, units[lives.to(units.device)], run.optimizer)

    def finish(self, run: Run) -> None:
        """Say if layers held still kept the target from being reached, or no layer had scores for the one split."""
        spaces = run.spaces(training=False)
        if self.every is None and "split" not in run.saved:
            run.report_missing([s for s in spaces if not self.score.has_evidence(s)], 0, self._not_done)
        if not run.memory.missed or not self.fixed_at_end:
            return
        budget, target = self.budget_for(run.config), self._ends(run, spaces, spaces)[1]
        alive = sum(space.count * budget.cost(space) for space in spaces)
        if alive > target:
            warnings.warn(
                f"Allocate.budget={budget} was not reached: {alive} live instead of {target}, because layers were "
                "held still by another rule when they were due. Let modules take turns more often, or raise "
                "final_warmup.",
                stacklevel=2,
            )

    @torch.no_grad()
    def scores(self, space: UnitSpace) -> Tensor:
        """Scores of the candidates of `space` `[k]` fp32; of a counted space one score, of the matrix, fp64."""
        # Products of two small averages leave fp32's range where a whole matrix has one score.
        numbers = self.score.numbers(space, torch.float64 if space.counted else torch.float32)
        by_parameter = [_of_units(numbers[name], axis) for name, (_, axis) in space.scored_parameters().items()]
        if self.unit_score == "mean" or (self.unit_score is None and len(self.spaces) > 1):
            found = sum(scores.sum(1) for scores in by_parameter) / sum(scores.shape[1] for scores in by_parameter)
        else:
            found = sum(scores.mean(1) for scores in by_parameter)
        return found if space.counted else found[: space.candidates().numel()]


def _of_units(numbers: Tensor, axis: int | None) -> Tensor:
    """`[units, numbers of each]`; one row where all numbers belong to every unit."""
    return numbers.flatten()[None] if axis is None else numbers.movedim(axis, 0).unsqueeze(1).flatten(1)
