"""`StableRank`: factors are cut to the ranks of their updates once these have settled (Cuttlefish)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..optim import innermost
from ..utils.option_types import NonNegativeInt, PositiveFloat, PositiveInt, Range
from ..utils.parts import register_part
from .collectives import from_first_rank
from .evidence import with_gradient
from .moves import move_units, restart_units
from .no_effect import report_unfinished, some_of
from .rule import RankRule
from .run import Run
from .space import UnitSpace

_DECIMALS = 4
"""Decimals of a stable rank: the update of one component has 1, not 1 + 1e-7, of which the ceiling is 2."""


@register_part("stable_rank")
@dataclass(frozen=True)
class StableRank(RankRule):
    r"""Ranks by stable rank, :math:`\mathrm{sr}(\Delta W) = \|\Delta W\|_F^2 / \|\Delta W\|_2^2`, cut once (Cuttlefish;
    Wang et al., 2023). A module is stable, for good, once the mean of :math:`|\nabla|` over the `last` values of the
    series' moving average (:math:`2/(N+1)` of each new value) is at most `threshold`, by central differences. When all
    are, each gets the rank :math:`\lceil\xi\,\mathrm{sr}\rceil` (at most its own) and the factors of the truncated SVD,
    :math:`B = U\sqrt\Sigma` and :math:`A = \sqrt\Sigma V^\top`, with fresh optimizer state; where that is its own rank
    nothing changes. A module that is held still then follows when it trains again.

    The defaults are the released code's for CIFAR; for ImageNet `window=5, last=5, threshold=0.411, first=5,
    relaxed_at=(9, 4)`. Published for whole weights; for adapters, whose update starts at 0, the first nonzero
    measurement is in place of the initial one, so that :math:`\xi` (`scaled`) is off. The cut comes right after the
    measurement, where the next epoch begins. Series are of the low-rank half alone.
    Without: profiling by measured speed, which leaves early layers of a convolutional network at full rank (an adapter
    has no full-rank form to leave a layer at: `exclude_modules`, `rank_pattern`). Frobenius decay is a rule of its own,
    `FrobeniusDecay`. A layer without a gradient at a
    measurement has none in its series; with no series it keeps its rank and is named in a warning.
    Modules that other rules have held still from the start are waited for.
    """

    every: PositiveInt | None = None
    """Optimizer steps between two measurements; None: an epoch."""
    window: PositiveInt = 15
    """N of the moving average."""
    last: PositiveInt = 11
    """Values whose gradients are averaged."""
    threshold: PositiveFloat = 0.1
    """Change of the stable rank in a measurement that counts as none."""
    first: NonNegativeInt = 15
    """The first measurement at which a module may be stable, from 0; the initial one is before that."""
    relaxed_at: tuple[NonNegativeInt, NonNegativeInt] = (2, 1)
    """The threshold is multiplied by the first of `relaxations` where at most so many modules are not stable yet, and
    by the second where at most so many."""
    relaxations: tuple[PositiveFloat, PositiveFloat] = (2.5, 5.0)
    """Those factors (released code: 1 and 2 for other networks than ResNet-18 and VGG-19)."""
    scaled: bool = False
    r"""Whether :math:`\xi = r / \mathrm{sr}` at the first measurement, as published, or 1. The first update of a LoRA
    is nearly of rank 1, so that with :math:`\xi` ranks are hardly ever cut."""
    truncated: bool = False
    """Whether stable ranks are truncated to integers, as in the released code, whose ranks are in the hundreds."""
    floor: Annotated[float, Range(least=0, most=1)] = 0.0
    """Fraction of a module's rank that stays at least (released scripts for DeiT and ResMLP: 0.5)."""

    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "trains"})
    gate: ClassVar[str] = "ones"

    def begin(self, run: Run) -> None:
        """Hold the gates still; an epoch must have a length."""
        run.updates.hold(run, [space.gate for space in run.all_spaces])
        run.memory.every = run.interval("StableRank.every", self.every)
        run.saved.setdefault("series", {})
        run.saved.setdefault("stable", [])
        cause = f"StableRank.first={self.first} and every={run.memory.every} take measurements"
        report_unfinished(run, 0, run.memory.every, self.first + 2, cause, "Lower first or every, or train longer.")

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Note who trains, and who of them had evidence."""
        for space in run.spaces():
            run.saved["series"].setdefault(space.name, [])
        run.memory.judged = [] if run.step_skipped else with_gradient(run.spaces())

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Measure, and cut those that train at this step once all are stable."""
        if "ranks" not in run.saved and run.step % run.memory.every == 0:
            self._measure(run)
        left = run.saved.get("ranks", {})
        due = [space for space in run.memory.judged if space.name in left]
        for space in due:
            factorize(space, left.pop(space.name), run.optimizer)
        if due:
            run.record_change(alive=sum(one.count for one in run.all_spaces))

    def _measure(self, run: Run) -> None:
        series, stable = run.saved["series"], run.saved["stable"]
        for space in run.memory.judged:
            if (found := measured(space)) is not None:
                series[space.name].append(float(int(found)) if self.truncated else found)
        trained = _in_optimizer(run)
        waiting = [space for space in run.all_spaces if space.name not in series and id(space.B) in trained]
        left = [name for name, values in series.items() if values and name not in stable]
        threshold = self.threshold_for(len(left) + len(waiting))
        settled = [name for name in left if self.is_stable(series[name], threshold)]
        stable += settled
        if not stable or waiting or len(settled) < len(left):
            return
        judged = self._with_series(run)
        run.saved["ranks"] = {space.name: self.rank(series[space.name], space.count) for space in judged}

    def _with_series(self, run: Run) -> list[UnitSpace]:
        series = run.saved["series"]
        return run.with_evidence(run.all_spaces, lambda space: bool(series.get(space.name)), "the rank was not cut")

    def threshold_for(self, unstable: int) -> float:
        """The threshold with so many modules that are not stable yet."""
        many, few = self.relaxed_at
        factor = self.relaxations[1] if unstable <= few else self.relaxations[0] if unstable <= many else 1.0
        return self.threshold * factor

    def is_stable(self, series: list[float], threshold: float) -> bool:
        """Whether a series, the initial value first, has settled."""
        if len(series) < self.first + 2:
            return False
        average, weight = [series[0]], 2 / (self.window + 1)
        for value in series[1:]:
            average.append(weight * value + (1 - weight) * average[-1])
        (gradient,) = torch.gradient(torch.tensor(average, dtype=torch.float64))
        return float(gradient[-self.last :].abs().mean()) <= threshold

    def rank(self, series: list[float], full: int) -> int:
        """The rank of a module of rank `full`, by the last value."""
        scaled = series[-1] * (full / series[0] if self.scaled else 1.0)
        least = max(1, math.ceil(self.floor * full))
        return min(full, max(least, math.ceil(round(scaled, _DECIMALS))))

    def finish(self, run: Run) -> None:
        """Name the layers that had no evidence, and those that had not settled, where ranks were never cut."""
        if "ranks" in run.saved:
            return
        self._with_series(run)
        measured_often = [name for name, values in run.saved["series"].items() if len(values) >= self.first + 2]
        restless = [name for name in measured_often if name not in run.saved["stable"]]
        if restless:
            warnings.warn(
                f"StableRank cut no rank: at the end of the run the stable ranks of {len(restless)} modules "
                f"({some_of(restless)}) still changed by more than threshold={self.threshold} in a measurement. Train "
                "longer, or raise threshold or every.",
                stacklevel=2,
            )


def _in_optimizer(run: Run) -> set[int]:
    return {id(one) for group in innermost(run.optimizer).param_groups for one in group["params"]}


def measured(space: UnitSpace) -> float | None:
    """The stable rank of the update; None where it is 0 or not finite."""
    values = from_first_rank(_decomposed(space)[1])
    if not values[0]:
        return None
    return round(float((values / values[0]).double().square().sum()), _DECIMALS)


@torch.no_grad()
def factorize(space: UnitSpace, rank: int, optimizer: Any) -> None:
    """Let the first `rank` living components be the balanced factors of the update's truncated SVD, with fresh
    optimizer state; nothing where no more live, and where it is 0 or not finite."""
    alive = space.alive()
    if rank >= alive.numel():
        return
    left, values, right = map(from_first_rank, _decomposed(space))
    if not values.any():
        return
    rank = min(rank, values.numel())
    for parameter, axis in space.parameter_axes():
        if parameter is not space.gate:
            everything = torch.ones(space.size, dtype=torch.bool, device=parameter.device)
            restart_units(parameter, everything, optimizer, axis)
    kept, roots = alive[:rank], values[:rank].sqrt()
    space.B.data[:, kept] = (left[:, :rank] * roots).to(space.B.dtype)
    space.A.data[kept] = (roots[:, None] * right[:rank]).to(space.A.dtype)
    space.gate.data[kept] = 1.0
    move_units(space, kept, optimizer)


def _decomposed(space: UnitSpace) -> tuple[Tensor, Tensor, Tensor]:
    r""":math:`U` `[out, k]`, :math:`\sigma` `[k]` and :math:`V^\top` `[k, in]` of :math:`B\,\mathrm{diag}(g) A` in
    fp32, by the SVD of a core of the size of the rank; zeros where it is not finite."""
    alive = space.alive()
    B, A = (space.B.detach() * space.gate.detach())[:, alive].float(), space.A.detach()[alive].float()
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        B, A = torch.zeros_like(B), torch.zeros_like(A)  # an SVD of them would raise
    (basis_B, core_B), (basis_A, core_A) = torch.linalg.qr(B), torch.linalg.qr(A.t())
    U, values, Vh = torch.linalg.svd(core_B @ core_A.t(), full_matrices=False)
    return basis_B @ U, values, Vh @ basis_A.t()
