"""`Prune`: units of supports or masks leave along a curve, those with the smallest values first; or experts."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..sparsity import Cubic, stream_seed, top_units
from ..utils.option_types import PositiveFraction, PositiveInt, Range
from ..utils.parts import register_part, require
from ..utils.tensors import TensorSpec
from .collectives import all_reduce_sum
from .evidence import is_evidence
from .moves import move_units
from .no_effect import report_idle
from .rule import Rule, check_kind
from .run import Run
from .space import UnitSpace, unit_sums
from .training_budget import budget_of_training


@register_part("prune")
@dataclass(frozen=True)
class Prune(Rule):
    r"""Gradual magnitude pruning of supports or masks (Zhu and Gupta, 2017): after step `t` of a window of the run the
    fraction :math:`f + (1-f)(1 - \frac{t-t_b}{t_e-t_b})^3` of the injected units lives, the units with the smallest
    :math:`\sum|\delta|` leaving first.

    Once in `every` steps of the window, and once at its end, units leave until the curve's fraction is left; capacity
    stays allocated until `compact()`. Beside a rule that regrows supports, units leave at its moves instead, before new
    ones enter: a fresh unit is never judged while its value is still 0. Where no move comes after the window's end, the
    last pruning is at its end all the same. Every layer keeps at least one unit. A layer whose values are all 0 (it
    never had a gradient) or not finite keeps its units and is named in a warning. Layers that are held still lose
    nothing; they follow, once in `every` steps, after the window, when they train again.

    With `space="mask"` the weight itself is pruned: of all its entries that fraction is kept, those that live having
    the largest :math:`|W + D|`, the weight as it would be merged. Entries that left do not return.

    With `space="expert"` experts of routed adapters leave, those with the fewest tokens since the last pruning first
    (in training passes, before capacity; where all experts take all tokens, by the sum of their probabilities).
    """

    final_fraction: PositiveFraction = 0.5
    """Fraction of the injected units that lives at the end: a density d ends as `final_fraction * d`."""
    start: Annotated[float, Range(least=0, below=1)] = 0.25
    """Where pruning starts, as a fraction of the run."""
    end: PositiveFraction = 0.75
    """Where pruning has reached `final_fraction`, as a fraction of the run."""
    every: PositiveInt = 10
    """Optimizer steps between two prunings."""
    scope: Literal["layer", "global"] = "layer"
    """Whether every layer loses the same fraction, or units of all layers compete (by mean |value| of a unit)."""
    space: Literal["support", "mask", "expert"] = "support"
    """What is thinned out: the support of a sparse adapter, the mask of a masked one, the experts of a routed one."""
    score: Literal["merged", "base"] = "merged"
    """Of a mask: whether entries are ranked by :math:`|W + D|`, or by the base weight's :math:`|W|` alone."""
    unit: Literal["steps", "compute"] = "steps"
    r"""What `start` and `end` are fractions of: the run's steps, or its compute, where a step costs
    :math:`f + (1-f)` times what lives (Jin et al., 2025). Early steps are dense and dear, so that the window lies
    earlier in the run."""
    fixed_share: Annotated[float, Range(least=0, below=1)] = 0.0
    """With `unit="compute"` the part f of a dense step's compute that pruning leaves: embeddings, attention, a head."""

    writes: ClassVar[frozenset[str]] = frozenset({"units"})
    within: ClassVar[frozenset[str]] = frozenset({"regrow"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start < self.end, self, "start", f"a fraction of the run from 0 to below end={self.end}")
        accepted = "0 with unit='steps', where compute does not count"
        require(self.unit == "compute" or not self.fixed_share, self, "fixed_share", accepted)

    @property
    def acts_on(self) -> frozenset[str]:
        """The kind of `space`."""
        return frozenset({self.space})

    def check(self, config: Any) -> None:
        """Refuse an adapter without such units, or with units that stopped training."""
        check_kind(self, config)
        if self.space != "mask" and self.score != "merged":
            raise ValueError(f"Prune.score={self.score!r} ranks the entries of a mask. Set space='mask'.")
        if self.space == "support" and not config.has_support:
            raise ValueError("Prune thins the support, and density=0 leaves it out. Set density > 0.")
        if config.freezes_units:
            raise ValueError(
                "Prune takes units away, and another rule keeps units that stopped training (retired or frozen ones). "
                "Keep one of the two."
            )

    def living_fraction(self, update: int, total_steps: int) -> float:
        """Fraction of the injected units that lives after `update` of `total_steps` steps."""
        first, last = self._window(total_steps)
        progress = (update - first) / (last - first)
        return Cubic(1.0, self.final_fraction)(min(max(progress, 0.0), 1.0))

    def window(self) -> tuple[float, float]:
        r"""Where pruning starts and ends, as fractions of the run's steps.

        With `unit="compute"` and :math:`\sigma = (1-f)(1-\mathrm{final})`: a cubic ramp has 3/4 of its end's sparsity
        in the mean, so the run's compute relative to a dense one is :math:`C = 1 / (a + \frac{b-a}{1 - .75\sigma} +
        \frac{1-b}{1-\sigma})`, pruning starts at :math:`a\,C` and lasts :math:`\frac{(b-a)\,C}{1 - .75\sigma}`.
        """
        if self.unit == "steps":
            return self.start, self.end
        sigma = (1 - self.fixed_share) * (1 - self.final_fraction)
        ramp = (self.end - self.start) / (1 - 0.75 * sigma)
        compute = 1 / (self.start + ramp + (1 - self.end) / (1 - sigma))
        return self.start * compute, (self.start + ramp) * compute

    def _window(self, total_steps: int) -> tuple[int, int]:
        # Whole steps, or the fraction at the step nearest to `end` would not be the final one.
        first, last = self.window()
        return round(first * total_steps), round(last * total_steps)

    # In training

    def begin(self, run: Run) -> None:
        """The window must hold at least one step."""
        first, last = self._window(run.total_steps)
        if last <= first:
            raise ValueError(
                f"Prune.start={self.start} and Prune.end={self.end} leave no step in a run of {run.total_steps}. Train "
                "longer, widen the window, or leave the rule out."
            )
        run.memory.missed = False
        run.memory.tokens = {}
        if not run.resumed:  # a resumed run said it at its start
            self._check_effect(run)

    def _check_effect(self, run: Run) -> None:
        """Name the layers that lose no unit, and a curve of one step."""
        spaces = [space for space in run.spaces() if space.count]  # the others wait for data
        targets = [self._target(space, self.final_fraction) for space in spaces]
        if self.scope == "global":
            idle = spaces if sum(targets) >= sum(space.count for space in spaces) else []
        else:
            idle = [space for space, target in zip(spaces, targets, strict=True) if target >= space.count]
        sizes = sorted({space.count for space in idle})
        report_idle(
            [space.name for space in idle],
            len(spaces),
            f"Prune.final_fraction={self.final_fraction} keeps all of {' or '.join(map(str, sizes[:3]))} units: 0 "
            "units ever leave",
            "Lower final_fraction, raise density, or leave the rule out.",
        )
        first, last = self._window(run.total_steps)
        steps = sum(self._due(run, update) for update in range(first, last + 1))
        if steps == 1 and last - first > 1 and len(idle) < len(spaces):
            warnings.warn(
                f"Prune.every={self.every} is not below the window's {last - first} steps (start={self.start}, "
                f"end={self.end} of {run.total_steps}): all units leave at once, not along a curve. Lower every (or "
                "Regrow's, where supports regrow), widen the window or train longer.",
                stacklevel=2,
            )

    @property
    def takes_shards(self) -> bool:
        """Where supports are pruned."""
        return self.space == "support"

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """Tokens of experts since the last pruning."""
        own = [TensorSpec("load", (space.size,), role="rule", space="expert")] if space.kind == "expert" else []
        return [*super().state(space), *own]

    def before_step(self, run: Run) -> None:
        """Count tokens of experts."""
        if self.space == "expert":
            counts = {space: torch.zeros_like(run.state(space)["load"]) for space in run.spaces(training=False)}
            run.memory.tokens = counts
            run.for_this_step([space.reading(partial(_count_tokens, space, load)) for space, load in counts.items()])

    def after_step(self, run: Run) -> None:
        """Prune what is due."""
        for space, counts in run.memory.tokens.items():
            run.state(space)["load"].add_(all_reduce_sum(counts))
        run.memory.tokens = {}
        if not self._due(run, run.step):
            return
        spaces = run.spaces(training=False)
        training = [space for space in spaces if space.trains]
        judged = run.with_evidence(training, self._has_evidence, f"the {self.space} was not pruned")
        run.memory.missed = run.memory.missed or len(training) < len(spaces)
        if judged:
            self._prune(run, judged, [space for space in spaces if not space.trains])

    def _due(self, run: Run, update: int) -> bool:
        first, last = self._window(run.total_steps)
        moves_after = _moves_of(run.config)
        if moves_after is None:
            return update == last or (first < update and (update - first) % self.every == 0)
        # Moves go on after the window; the fraction is constant there, so that pruning again does nothing.
        if first < update < run.total_steps and moves_after(update, run.total_steps):
            return True
        return update == last and not any(moves_after(step, run.total_steps) for step in range(last, run.total_steps))

    def _prune(self, run: Run, spaces: list[UnitSpace], held_still: list[UnitSpace]) -> None:
        fraction = self.living_fraction(run.step, run.total_steps)
        targets = [self._target(space, fraction) for space in spaces]
        scores = {}
        if self.scope == "global":
            everybody = [*spaces, *held_still]
            sizes = [self._target(space, fraction) for space in everybody]
            total = budget_of_training(sum(sizes), everybody, [space.count for space in everybody], sizes)
            scores = {space: self._scores(space) for space in spaces}
            importance = list(scores.values())
            targets = _global_targets(spaces, importance, total, stream_seed(run.seed, "pruning", run.step))
        left = 0
        for space, target in zip(spaces, targets, strict=True):
            if target < space.count and space.counted:
                left += space.count - target
                space.resize(target)
            elif target < space.count:
                seed = stream_seed(run.seed, "pruning", run.step, space.name)
                best = top_units(scores[space] if space in scores else self._scores(space), target, seed=seed)
                left += move_units(space, space.alive()[best.long()], run.optimizer).left
        for space in spaces if self.space == "expert" else ():
            space.state()["load"].zero_()
        run.record(pruned=left, alive=sum(space.count for space in spaces))

    def _scores(self, space: UnitSpace) -> Tensor:
        """`[a]` fp32, of the living units."""
        if self.space == "expert":
            return space.state()["load"][space.alive()]
        values = space.living_values(self.score) if self.space == "mask" else space.living_values()
        return unit_sums(values)

    def _has_evidence(self, space: UnitSpace) -> bool:
        return space.counted or is_evidence(self._scores(space))

    @staticmethod
    def _target(space: UnitSpace, fraction: float) -> int:
        return max(1, round(fraction * space.capacity))

    def finish(self, run: Run) -> None:
        """Say which layers were held still whenever they were due."""
        if not run.memory.missed:
            return
        spaces = run.spaces(training=False)
        targets = [self._target(space, self.final_fraction) for space in spaces]
        over = [space.name for space, target in zip(spaces, targets, strict=True) if space.count > target]
        if sum(space.count for space in spaces) > sum(targets):
            warnings.warn(
                f"Prune.final_fraction={self.final_fraction} was not reached: {len(over)} layers, such as '{over[0]}', "
                "were held still by another rule whenever they were due. Let modules take turns more often, or end the "
                "pruning earlier (Prune.end).",
                stacklevel=2,
            )


@torch.no_grad()
def _count_tokens(space: UnitSpace, load: Tensor, routing: Tensor) -> None:
    """Add the tokens of a pass to `load`."""
    load += routing[1 if space.routes else 0].sum(0).to(load)


def _moves_of(config: Any) -> Any:
    """`moves_after(update, total_steps)` of the rule that regrows the same units, if there is one."""
    regrows = [rule for rule in config.rules if rule.part_type in Prune.within] if config is not None else []
    return regrows[0].moves_after if regrows else None


def _global_targets(spaces: list[UnitSpace], importance: list[Tensor], total: int, seed: int) -> list[int]:
    """Units each space keeps when its best one and the best of all others, by mean |value|, stay: `total` together."""
    means = [scores.cpu() / max(space.unit_numel, 1) for space, scores in zip(spaces, importance, strict=True)]
    for mean in means:
        mean[mean.argmax()] = torch.inf  # which of equal ones is no matter: counts are read off
    sizes = torch.tensor([scores.numel() for scores in importance])
    kept = top_units(torch.cat(means), min(total, int(sizes.sum())), seed=seed)
    owner = torch.bucketize(kept.long(), sizes.cumsum(0), right=True)
    return torch.bincount(owner, minlength=len(spaces)).tolist()
