"""`GrowRank`: modules that matter are given further ranks while they train (IncreLoRA)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..utils.parts import register_part, require
from ..utils.tensors import TensorSpec
from .moves import move_units
from .no_effect import report_unfinished
from .own_clock import EnteringRate, clock_spec, rate_factor, start_units
from .rule import Rule
from .run import Run
from .scores import ModuleSensitivity, Smoothed, TrainingScore
from .space import UnitSpace


@register_part("grow_rank")
@dataclass(frozen=True)
class GrowRank(Rule):
    r"""Ranks `R` that grow where they matter, :math:`\Delta W = \frac{\alpha}{R + 10^{-5}} B\,\mathrm{diag}(E) A`, with
    the gate `E` (IncreLoRA; Zhang et al., 2023).

    After update `t` (from 0), :math:`t > t_{warm}` a multiple of `every`, the `modules` with the best scores get
    `grow_by` components each. The next `grow_by` components of a module are its reserve: their factors train with a
    small fixed gate, in the score too; evaluation and files are without. What begins to train has optimizer state from
    zero (bias correction with `AgedAdamW`). An adapter that was trained before keeps its ranks. Needs fp32 optimizer
    state and slices for `config.r` components in every module.

    Departs from the released code: no module grows beyond `config.r`, and rounds never overshoot; the score is of all
    micro-batches and ranks, not of the last; `Orthogonality` counts components beyond the reserve, held still as they
    are. Growing after the optimizer's step changes nothing: what enters has no gradient yet.
    """

    target_r: int = 2
    """Average rank at the end; at the start it is 1."""
    modules: int = 3
    """Modules that grow at a time (released code: 2 to 22 by task)."""
    grow_by: int = 1
    """Components that one gets (released code: half of `target_r`)."""
    every: int = 100
    """Optimizer steps between two growths."""
    warmup: int = 100
    """Steps before the first, which comes at the next multiple of `every`."""
    reserve_gate: float = 1e-5
    """Gate of the reserve, and of components that enter. 0: the reserve does not train (no advance learning)."""
    score: TrainingScore = field(default_factory=lambda: Smoothed(ModuleSensitivity()))
    """How much a module matters. `Smoothed()`, from the gradients of factors and gate, needs no dense gradient."""
    entering_lr: EnteringRate = "own_clock"
    """Learning rate of what begins to train: "own_clock", "constant" or "run" (`rules.own_clock`)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "trains"})

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"target_r": 1, "modules": 1, "grow_by": 1, "every": 1, "warmup": 0, "reserve_gate": 0}
        for name, value in least.items():
            require(getattr(self, name) >= value, self, name, f"a number >= {value}")

    @property
    def needs(self) -> frozenset[str]:
        """A gate, and `gradient` where the score reads dense gradients."""
        return frozenset({"gate", "gradient"} if self.score.of_modules else {"gate"})

    def check(self, config: Any) -> None:
        """Refuse a target that modules have no room for."""
        if self.target_r > config.r:
            raise ValueError(
                f"GrowRank.target_r={self.target_r} is above r={config.r}, which is the most that a module can reach. "
                "Set r to a few times target_r."
            )

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """What the score keeps, and since when components train."""
        return [*self.score.state(space), clock_spec(space)]

    def begin(self, run: Run) -> None:
        """Let one component of each module live, and hold still what is not revealed yet."""
        spaces = run.spaces(training=False)
        for space in spaces:
            if not run.resumed and not space.gate.any():
                move_units(space, torch.arange(1, device=space.gate.device), run.optimizer)
        run.memory.left = self.target_r * len(spaces) - sum(space.count for space in spaces)
        run.hold_units(lambda space, parameter: ~self._trained(run, space, parameter))
        run.scale_updates(lambda space, parameter: rate_factor(run, space, parameter, self.entering_lr))
        rounds = -(-run.memory.left // (self.grow_by * min(self.modules, len(spaces))))
        if rounds > 0:
            last = (self.warmup // self.every + rounds) * self.every
            cause = f"GrowRank.target_r={self.target_r}, every={self.every} and modules={self.modules} take growths"
            report_unfinished(run, last, cause, "Raise modules, or lower every.")

    def _reserve(self, run: Run, space: UnitSpace) -> Tensor:
        """Components that enter next, bool `[r]`; none in the first step, and at the target."""
        dead, open_ = space.mask == 0, run.step > 0 and run.memory.left > 0
        return dead & (dead.cumsum(0) <= (self.grow_by if open_ else 0))

    def _trained(self, run: Run, space: UnitSpace, parameter: nn.Parameter) -> Tensor:
        in_advance = self.reserve_gate and parameter is not space.gate
        return (space.mask != 0) | self._reserve(run, space) if in_advance else space.mask != 0

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Scale by the current rank, add the reserve, and read what the score needs while ranks grow."""
        spaces = run.spaces(training=False)
        for space in spaces:
            for parameter in space.parameters():
                start_units(run, space, parameter, self._trained(run, space, parameter))
            run.for_this_step(space.scaled_by_rank(epsilon=1e-5))
            space.gate.data[self._reserve(run, space)] = self.reserve_gate
        self.score.before_step(run, spaces if run.memory.left > 0 else [])

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Update the scores, and grow where it is due."""
        spaces = [] if run.step_skipped or run.memory.left <= 0 else run.spaces()
        self.score.update(run, spaces)
        if not spaces or run.step <= self.warmup or run.step % self.every:
            return
        judged = run.with_evidence(spaces, self.score.has_evidence, "the rank did not grow")
        judged = [space for space in judged if space.count < space.size]
        for space in sorted(judged, key=self.score.module_score, reverse=True)[: self.modules]:
            entering = self._reserve(run, space).nonzero().squeeze(1)[: run.memory.left]
            run.memory.left -= move_units(space, torch.cat([space.alive(), entering]), run.optimizer).entered
        run.record(alive=sum(space.count for space in run.spaces(training=False)))
