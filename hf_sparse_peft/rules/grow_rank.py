"""`GrowRank`: modules that matter are given further ranks while they train (IncreLoRA)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..utils.parts import register_part, require
from ..utils.tensors import TensorSpec
from .collectives import all_reduce_mean
from .evidence import MissingEvidence
from .gradient_readers import MicroBatchReader
from .moves import move_units
from .rule import Rule
from .run import Run
from .scores import Smoothed
from .space import UnitSpace


@register_part("grow_rank")
@dataclass(frozen=True)
class GrowRank(Rule):
    r"""Ranks `R` that grow where they matter, :math:`\Delta W = \frac{\alpha}{R + 10^{-5}} B\,\mathrm{diag}(E) A`, with
    the gate `E` (IncreLoRA; Zhang et al., 2023).

    A module's score is :math:`S = \sum|\Delta W \odot \partial L/\partial\Delta W| / \sqrt{mn}`, smoothed as by
    `Smoothed`: of the loss alone, unclipped, before the step, of all micro-batches, averaged over ranks. After update
    `t` (from 0), :math:`t > t_{warm}` a multiple of `every`, the `modules` best get `grow_by` components each, never
    beyond `target_r` on average or `config.r` in one module. The next `grow_by` components of a module are its reserve:
    their factors train with a small fixed gate, which counts in `S`; evaluation and files are without. An adapter that
    was trained before keeps its ranks. Needs a dense gradient of every weight at every step until the target is reached
    (with accumulation all of them at once), fp32 optimizer state (parts of parameters are held still), and slices for
    `config.r` components in every module.

    Departs from the released code: components that enter follow the run's learning rate at once (no warm-up of their
    own) and Adam's bias correction of their parameter; modules cannot grow beyond `config.r`; rounds never overshoot;
    `Orthogonality` counts components beyond the reserve in its norms, held still as they are. Growing after the
    optimizer's step instead of before it changes nothing: what enters has no gradient yet.
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

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "trains"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate", "gradient"})

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"target_r": 1, "modules": 1, "grow_by": 1, "every": 1, "warmup": 0, "reserve_gate": 0}
        for name, value in least.items():
            require(getattr(self, name) >= value, self, name, f"a number >= {value}")

    def check(self, config: Any) -> None:
        """Refuse a target that modules have no room for."""
        if self.target_r > config.r:
            raise ValueError(
                f"GrowRank.target_r={self.target_r} is above r={config.r}, which is the most that a module can reach. "
                "Set r to a few times target_r."
            )

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """Smoothed score and uncertainty of the module."""
        return [TensorSpec("module_score", (2,), role="rule")]

    def begin(self, run: Run) -> None:
        """Let one component of each module live, and hold still what is not revealed yet."""
        spaces, memory = run.spaces(training=False), run.memory
        for space in spaces:
            if not run.resumed and not space.gate.any():
                move_units(space, torch.arange(1, device=space.gate.device), run.optimizer)
        memory.scalings, memory.readers = {}, {s: _ModuleScore(s, run.training.accumulation) for s in spaces}
        memory.left = self.target_r * len(spaces) - sum(space.count for space in spaces)
        memory.missing = MissingEvidence("the rank did not grow")
        memory.missing.start(run.step)
        parts = [(p, partial(self._still, run, space, p)) for space in spaces for p in space.parameters()]
        run.updates.hold_part(self, parts)
        rounds = -(-memory.left // (self.grow_by * min(self.modules, len(spaces))))
        last = (self.warmup // self.every + rounds) * self.every
        if not run.resumed and rounds > 0 and last >= run.total_steps:
            warnings.warn(
                f"GrowRank: target_r={self.target_r} takes growths up to step {last} (every={self.every}, "
                f"modules={self.modules}), and the run has {run.total_steps}. Raise modules, or lower every.",
                stacklevel=2,
            )

    def _reserve(self, run: Run, space: UnitSpace) -> Tensor:
        """Components that enter next; none in the first step, and at the target."""
        dead = (space.mask == 0).nonzero().squeeze(1)
        return dead[: self.grow_by if run.step and run.memory.left > 0 else 0]

    def _still(self, run: Run, space: UnitSpace, parameter: Tensor) -> Tensor:
        held = space.mask == 0
        if self.reserve_gate and parameter is not space.gate:
            held[self._reserve(run, space)] = False
        return held.expand_as(parameter) if parameter is space.B else held

    @torch.no_grad()
    def before_step(self, run: Run) -> None:
        """Scale by the current rank, add the reserve, and read gradients while ranks grow."""
        for space in run.spaces(training=False):
            run.memory.scalings[space] = space.scalings[space.adapter]
            space.scalings[space.adapter] *= _scale(space)
            space.gate.data.div_(_scale(space))
            space.gate.data[self._reserve(run, space)] = self.reserve_gate
            if run.memory.left > 0:
                run.memory.readers[space].total.zero_()
                run.read_gradient(space, run.memory.readers[space])

    def after_micro_batch(self, run: Run) -> None:
        """What comes next is another micro-batch's gradient."""
        for reader in run.memory.readers.values():
            reader.finish_micro_batch()

    def gradients(self, run: Run) -> None:
        """The scores are complete."""
        for space, reader in run.memory.readers.items():
            reader.finish_step(run.loss_scale)
            run.stop_reading(space, reader)

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Smooth the scores, and grow where it is due."""
        spaces = [] if run.step_skipped or run.memory.left <= 0 else run.spaces()
        if not spaces:
            return
        scores = all_reduce_mean(torch.stack([run.memory.readers[space].total.cpu() for space in spaces]))
        for space, score in zip(spaces, scores, strict=True):
            if torch.isfinite(score):
                kept = run.state(space)["module_score"]
                Smoothed().take(score.to(kept), kept[0], kept[1])
        if run.step > self.warmup and run.step % self.every == 0:
            self._grow(run, spaces)

    def _grow(self, run: Run, spaces: list[UnitSpace]) -> None:
        scores = {space: float(run.state(space)["module_score"].double().prod()) for space in spaces}
        run.memory.missing.record(run.step, [s.name for s in spaces if not scores[s]], sum(map(bool, scores.values())))
        open_ = [space for space in spaces if scores[space] and space.count < space.size]
        for space in sorted(open_, key=scores.get, reverse=True)[: self.modules]:
            entering = self._reserve(run, space)[: run.memory.left]
            move_units(space, torch.cat([space.alive(), entering]).sort().values, run.optimizer)
            run.memory.left -= entering.numel()
        run.record(alive=sum(space.count for space in run.spaces(training=False)))

    def after_step(self, run: Run) -> None:
        """Leave what lives, in the config's own scaling, for evaluation and files."""
        while run.memory.scalings:
            space, scaling = run.memory.scalings.popitem()
            space.scalings[space.adapter] = scaling
            space.apply_mask()
            space.gate.data.mul_(_scale(space))

    def finish(self, run: Run) -> None:
        """Say so if no module had evidence."""
        run.memory.missing.finish()

    def release(self, run: Run) -> None:
        """Undo what a step that was broken off began."""
        for space, reader in getattr(run.memory, "readers", {}).items():
            run.stop_reading(space, reader)
            self.after_step(run)


class _ModuleScore(MicroBatchReader):
    """A module's score in a step, a 0-dim fp64 tensor `total`; several micro-batches need an fp32 sum of gradients."""

    def __init__(self, space: UnitSpace, micro_batches: int) -> None:
        super().__init__()
        self.space, self.sums, self._sum = space, micro_batches > 1, None
        self.total = torch.zeros((), dtype=torch.float64, device=space.gate.device)

    def take_whole(self, dense: Tensor) -> None:
        if self.sums:
            self._sum = dense.to(torch.float32, copy=True) if self._sum is None else self._sum.add_(dense)
        else:
            self._score(dense)

    @torch.no_grad()
    def finish_step(self, loss_scale: float = 1.0) -> None:
        self.finish_micro_batch()
        if self._sum is not None:
            self._score(self._sum)
            self._sum = None
        self.total /= loss_scale

    def _score(self, dense: Tensor) -> None:
        space = self.space
        delta = (space.B * (space.gate * space.scalings[space.adapter])) @ space.A
        self.total += (delta * dense).abs().sum() / dense.numel() ** 0.5


def _scale(space: UnitSpace) -> float:
    """What takes the config's scaling by the rank there is room for to one by the current rank."""
    return space.size / (space.count + 1e-5)
