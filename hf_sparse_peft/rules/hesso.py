"""`Hesso`: redundant groups are found by five scores, period by period, and shrunk to 0 in each (HESSO)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..sparsity import stream_seed, top_units
from ..utils.option_types import NonNegativeFloat, PositiveFraction, PositiveInt, Range
from ..utils.parts import register_part, require
from ..utils.tensors import TensorSpec
from .groups import groups_held, keep_dead_at_zero, members, places, scale_groups
from .moves import move_units
from .rule import Rule
from .run import Run
from .space import UnitSpace

CRITERIA = ("magnitude", "avg_magnitude", "cosine_similarity", "taylor_first_order", "taylor_second_order")


@register_part("hesso")
@dataclass(frozen=True)
class Hesso(Rule):
    r"""Hybrid efficient structured sparse optimizer (HESSO; Chen et al., 2024), around any optimizer.

    Of G groups :math:`K = \lfloor G \min(s, 0.999) \rfloor` go, :math:`\lfloor K / p \rfloor` in each of `p` periods of
    `P` updates, the remainder in the last. In the first update of a period, number `S + 1` for `S = start * steps` (`S`
    where P = 1), the groups with the lowest score are the redundant ones; after this update and the next ones all their
    numbers are multiplied by :math:`(P - t - 1)/(P - t)`, `t` updates after the period's start, so that they fall to 0
    linearly, where they die for good.

    The score of a group x with the optimizer's direction d, :math:`x' = x - \eta d`, is the sum of five, each weighted
    and divided by its Euclidean norm over all groups: :math:`\|x\|`, :math:`\|x\|/n`,
    :math:`\langle x, d\rangle / (\|x\|\|d\|) + 1`, :math:`|\langle x, d\rangle|`,
    :math:`\tfrac12\langle x, d\rangle^2`. Decoupled weight decay is part of d here and not in the released code, which
    may also pass over groups when some are 0 already, and can round counts up to a multiple.

    A group is a unit of a support, or a component of low rank whole: its row of `A`, its column of `B` and its gate. A
    layer without an update at the first step of a period has no redundant group in it; a support keeps one unit.
    """

    fraction: Annotated[float, Range(above=0, below=1)] = 0.5
    """s, the fraction of the groups that goes."""
    start: Annotated[float, Range(least=0, below=1)] = 0.25
    """Where the first period starts, as a fraction of the run."""
    end: PositiveFraction = 0.75
    """Where the last one ends, as a fraction of the run."""
    periods: PositiveInt = 10
    """p, the number of periods."""
    weights: dict[str, NonNegativeFloat] = field(default_factory=lambda: dict.fromkeys(CRITERIA, 0.2))
    """Weights of the scores, by their names in the released code."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support", "rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    gate: ClassVar[str] = "ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start < self.end, self, "start", f"a fraction of the run from 0 to below end={self.end}")
        known = set(self.weights) <= set(CRITERIA) and any(self.weights.values())
        require(known, self, "weights", f"weights of {', '.join(CRITERIA)}, one of them above 0")

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """uint8 `[capacity]`: 1 for the redundant groups of the period."""
        return [TensorSpec(f"redundant_{space.kind}", (space.capacity,), torch.uint8, "rule", space=space.kind)]

    # When: updates are counted from 1

    def first_and_duration(self, total_steps: int) -> tuple[int, int]:
        """S and P."""
        first = round(self.start * total_steps)
        return first, (round(self.end * total_steps) - first) // self.periods

    def begin(self, run: Run) -> None:
        """Every period must have an update.

        Raises:
            ValueError: the run is too short.
        """
        first, duration = self.first_and_duration(run.total_steps)
        if duration < 1:
            raise ValueError(
                f"Hesso.periods={self.periods} do not fit between start={self.start} and end={self.end} of a run of "
                f"{run.total_steps} steps. Lower periods, or train longer."
            )
        run.memory.first = first if duration > 1 else max(first, 1)
        run.memory.duration, run.memory.before = duration, {}
        run.saved.setdefault("groups", sum(space.count for space in run.spaces(training=False)))
        run.saved.setdefault("period", 0)

    def _starts_period(self, run: Run, update: int) -> bool:
        first, duration = run.memory.first, run.memory.duration
        within = update >= first and run.saved["period"] < self.periods
        return within and (update - first - 1) % duration == 0

    # In training

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Note the values before the first update of a period."""
        run.memory.before = {}
        if self._starts_period(run, run.step + 1):
            run.memory.before = {space: list(members(space)) for space in run.spaces() if space.count}

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Find the redundant groups where a period begins, and shrink those of this one."""
        update = run.step + 1
        if self._starts_period(run, update):
            self._find(run)
        t, duration = (update - run.memory.first) % run.memory.duration, run.memory.duration
        for space in run.spaces():
            if update >= run.memory.first:
                factor = (duration - t - 1) / (duration - t)
                redundant = _redundant(space)[places(space)].bool() & ~groups_held(run, space)
                scale_groups(space, torch.where(redundant, factor, 1.0))
            keep_dead_at_zero(space)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Groups that have reached 0 leave."""
        t = (run.step - run.memory.first) % run.memory.duration
        if run.step < run.memory.first or t != run.memory.duration - 1:
            return
        left = 0
        for space in run.spaces():
            redundant = _redundant(space)
            stays = redundant[places(space)] == 0
            if not stays.all():
                redundant.zero_()
                left += move_units(space, space.alive()[stays.to(space.alive().device)], run.optimizer).left
        if left:
            run.record(pruned=left, alive=sum(space.count for space in run.spaces(training=False)))

    def _find(self, run: Run) -> None:
        spaces, scores = [], []
        for space, before in run.memory.before.items():
            rates = [run.lr(parameter) or 1.0 for parameter, _ in space.parameter_axes()]
            after = members(space)
            directions = [(old - new) / rate for old, new, rate in zip(before, after, rates, strict=True)]
            if any(bool(one.any()) for one in directions):
                spaces.append(space)
                scores.append(raw_scores(before, directions))
        period, run.saved["period"] = run.saved["period"], run.saved["period"] + 1
        if not spaces:
            run.report_missing(run.spaces(), 0, "no group was found redundant")
            return
        total = int(run.saved["groups"] * min(self.fraction, 0.999))
        count = total // self.periods + (total % self.periods if period == self.periods - 1 else 0)
        overall = overall_scores(scores, self.weights)
        for space, mine in zip(spaces, overall.split([s["magnitude"].numel() for s in scores]), strict=True):
            if space.packed:
                mine[mine.argmax()] = torch.inf
        free = int(torch.isfinite(overall).sum())
        seed = stream_seed(run.seed, "hesso", period)
        chosen = torch.zeros(overall.numel(), dtype=torch.bool)
        chosen[top_units(-overall, min(count, free), seed=seed).long()] = True
        for space, mine in zip(spaces, chosen.split([s["magnitude"].numel() for s in scores]), strict=True):
            redundant = _redundant(space)
            redundant.zero_()
            redundant[places(space)[mine.to(redundant.device)]] = 1
        run.record(redundant=int(chosen.sum()))


def _redundant(space: UnitSpace) -> Tensor:
    return space.state()[f"redundant_{space.kind}"]


def raw_scores(values: list[Tensor], directions: list[Tensor]) -> dict[str, Tensor]:
    """The five scores of each group, `[a]` float64, from what it has of each parameter, `[a, n]`."""
    values, directions = torch.cat(values, 1).double(), torch.cat(directions, 1).double()
    norms, inner = values.norm(dim=1), (values * directions).sum(1)
    return {
        "magnitude": norms,
        "avg_magnitude": norms / (values.shape[1] + 1e-6),
        "cosine_similarity": inner / (norms + 1e-8) / (directions.norm(dim=1) + 1e-8) + 1,
        "taylor_first_order": inner.abs(),
        "taylor_second_order": 0.5 * inner.square(),
    }


def overall_scores(scores: list[dict[str, Tensor]], weights: dict[str, float]) -> Tensor:
    """`[all groups]` float64 on the CPU: the weighted sum of scores, each over its norm across all layers."""
    found = 0
    for name, weight in weights.items():
        every = torch.cat([one[name].cpu() for one in scores])
        found = found + weight * every / (every.norm() + 1e-8)
    return found
