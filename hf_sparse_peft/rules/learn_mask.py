"""`LearnMask`: the mask is that of the best trained scores (movement pruning, SMP)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from ..sparsity import Cubic, Source, Window, count_selected, find_cut, pack_bits, stream_seed, top_units
from ..utils.option_types import NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt, Range
from ..utils.parts import register_part, require
from .evidence import is_evidence
from .rule import Rule
from .run import Run
from .space import UnitSpace

LEAST = 0.005
"""Fraction of a matrix that lives at least where a threshold, its own or that of all, decides."""


@register_part("learn_mask")
@dataclass(frozen=True)
class LearnMask(Rule):
    r"""The mask keeps the entries with the best of the scores `S` that train beside it (`ScoredMask`), chosen anew
    after every update: the fraction :math:`v_t = v_f + (1 - v_f)(1 - p)^3`, `p` the progress from `start` to `end`
    (movement pruning; Sanh et al., 2020; SMP; Jiang et al., 2023).

    A penalty pulls scores down: :math:`\lambda_t` times the mean over matrices of the mean of :math:`\sigma(S)`, its
    gradient added once a step, after clipping. Exactly `int(v * n)` of the `n` entries that compete are kept; of equal
    scores drawn ones. A layer whose scores are all 0 (it never had a gradient) or not finite keeps its mask and is
    named; one that is held still follows when it trains again, or at the end. After the last step the scores are
    dropped: what is left of them is the mask.

    Raises:
        ValueError: a config without trained scores; a run that goes on without the scores.
    """

    final_density: PositiveFraction = 0.1
    r"""Fraction of the entries that is kept at the end, :math:`v_f`; with `threshold` the run decides."""
    start: Annotated[float, Range(least=0, below=1)] = 0.0
    """Where entries begin to leave, as a fraction of the run (SMP: 0)."""
    end: PositiveFraction = 0.6
    """Where `final_density` is reached (SMP on MNLI: 43,632 of 73,632 steps)."""
    competition: Literal["layer", "type", "global"] = "layer"
    r"""Which entries compete: those of a matrix (movement pruning, SMP-L); `type`: matrices of one name (q_proj, ...)
    share their entries as their scores lie, :math:`v_l = v L q_l / \sum q`, :math:`q_l` the mean of
    :math:`\sigma(S_l / \tau)`, and at most all of a matrix (SMP-S); `global`: those of all matrices, with at least
    0.5 % of each."""
    temperature: PositiveFloat = 1.0
    r""":math:`\tau` of `competition="type"` (SMP-S: 1; 3 for MNLI at 50 %, 4 from 70 % on)."""
    threshold: Annotated[float, Range(above=0, below=1)] | None = None
    r"""Soft movement pruning: entries with :math:`\sigma(S)` above it live, and at least 0.5 % + 1 of a matrix;
    `final_density`, `start`, `end` and `competition` say nothing then."""
    penalty: NonNegativeFloat = 0.0
    r""":math:`\lambda` at the end (SMP: 400)."""
    penalty_curve: Literal["cubic", "constant"] = "cubic"
    r"""`cubic`: :math:`\lambda_t = \lambda (1 - (1 - t/T)^3)` over the whole run; or :math:`\lambda` at every step."""
    every: PositiveInt = 1
    """Steps between two choices of the mask (as published: 1)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"mask"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "gradient"})
    undecayed: ClassVar[frozenset[str]] = frozenset({"scores", "score_factors"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start < self.end, self, "start", f"a fraction of the run from 0 to below end={self.end}")

    def check(self, config: Any) -> None:
        """Refuse an adapter without trained scores."""
        super().check(config)
        if not hasattr(config.masking, "score_gradients"):
            raise ValueError(
                f"LearnMask makes the mask of trained scores, and masking={config.masking} has none. Set "
                "masking=ScoredMask()."
            )

    def density(self, step: int, total: int) -> float:
        """v at a step."""
        return Window(Cubic(1.0, self.final_density), self.start, self.end)(step / total)

    def penalty_weight(self, step: int, total: int) -> float:
        r""":math:`\lambda_t`."""
        return self.penalty if self.penalty_curve == "constant" else Cubic(0.0, self.penalty)(step / total)

    # In training

    def begin(self, run: Run) -> None:
        """Scores must be there."""
        run.memory.missed = False
        for space in run.spaces(training=False):
            if space.scores() is None:
                raise ValueError(
                    f"The scores of '{space.name}' were dropped when its training ended, and only the mask is left. "
                    "Train on with schedule=[], or begin with a new adapter."
                )
        if not run.step:
            self._write_masks(run, run.spaces(training=False))

    def gradients(self, run: Run) -> None:
        """Add the penalty's gradient."""
        weight = self.penalty_weight(run.step, run.total_steps)
        spaces = run.spaces()
        for space in spaces if weight else ():
            share = space.scores().sigmoid()
            slope = share * (1 - share)
            space.add_score_gradient(slope, run.gradient_scale * weight / (len(spaces) * slope.numel()))

    def after_step(self, run: Run) -> None:
        """Choose the masks of what trains."""
        if run.step % self.every == 0 or run.step == run.total_steps:
            run.memory.missed = len(run.spaces()) < len(run.all_spaces)
            self._write_masks(run, run.spaces())

    def finish(self, run: Run) -> None:
        """Choose the last masks where layers were held still, and drop the scores."""
        if run.memory.missed:
            self._write_masks(run, run.spaces(training=False))
        for space in run.spaces(training=False):
            space.drop_scores()

    @torch.no_grad()
    def _write_masks(self, run: Run, spaces: list[UnitSpace]) -> None:
        if self.threshold is None and self.density(run.step, run.total_steps) >= 1:
            for space in spaces:
                space.write_bits(torch.full_like(space.bits, 255))
            return
        if run.step:
            spaces = run.with_evidence(spaces, lambda space: is_evidence(space.scores()), "the mask did not change")
        counts = self._counts(run, spaces)
        for space, count in counts.items():
            chosen = top_units([space.scores().reshape(-1)], count, seed=self._seed(run, space))
            mask = torch.zeros(space.size, dtype=torch.bool, device=chosen.device)
            mask[chosen.long()] = True
            space.write_bits(pack_bits(mask))

    def _counts(self, run: Run, spaces: list[UnitSpace]) -> dict[UnitSpace, int]:
        """How many entries of each matrix live."""
        if self.threshold is not None:
            return {s: max(int((s.scores().sigmoid() > self.threshold).sum()), int(LEAST * s.size) + 1) for s in spaces}
        density = self.density(run.step, run.total_steps)
        if self.competition == "global":
            sources = [Source(s.name, lambda s=s: [s.scores().reshape(-1)], self._seed(run, s)) for s in spaces]
            cut = find_cut(sources, int(density * sum(space.size for space in spaces)), finite=True)
            found = {space: count_selected(source, cut)[0] for space, source in zip(spaces, sources, strict=True)}
            return {space: max(count, int(LEAST * space.size)) for space, count in found.items()}
        if self.competition == "layer":
            return {space: int(density * space.size) for space in spaces}
        return {space: int(min(1.0, part) * space.size) for space, part in self._shares(spaces, density).items()}

    def _shares(self, spaces: list[UnitSpace], density: float) -> dict[UnitSpace, float]:
        """v of each matrix among those of its name."""
        alike: dict[str, dict[UnitSpace, float]] = defaultdict(dict)
        for space in spaces:
            mean = float((space.scores() / self.temperature).sigmoid().mean(dtype=torch.float64))
            alike[space.name.rsplit(".", 1)[-1]][space] = mean
        return {
            space: density * len(means) * mean / sum(means.values())
            for means in alike.values()
            for space, mean in means.items()
        }

    def _seed(self, run: Run, space: UnitSpace) -> int:
        return stream_seed(run.seed, "learned mask", space.name)
