"""`RelocateSubnets`: subnets move to the rows and columns that matter, transformer layer by layer (LoSiA)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..optim import restart_optimizer_state
from ..sparsity import best_subgrid, stream_seed
from ..utils.module_names import block_of
from ..utils.option_types import PositiveInt, Range
from ..utils.parts import register_part
from ..utils.tensors import TensorSpec
from .collectives import from_first_rank
from .evidence import is_evidence
from .gradient_readers import StepGradientReader
from .moves import move_units
from .no_effect import report_idle
from .rule import Rule
from .run import Run
from .scores import Smoothed
from .space import UnitSpace

_SCORES = ("subnet_importance", "subnet_uncertainty")


@register_part("relocate_subnets")
@dataclass(frozen=True)
class RelocateSubnets(Rule):
    r"""Moves subnets, one transformer layer at a time (LoSiA; Wang et al., 2025). The defaults are the paper's.

    The `L` layers with subnets take turns of `every` optimizer steps: what lies outside of numbered layers (a head)
    first, then layer after layer. In a layer's turn the dense gradient G of its weights W (base plus update, before
    the step) is read, :math:`a = W \odot G`, and smoothed twice from 0:

    .. math:: I = |a - a^2/2|, \quad \bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I, \quad
        \bar U \leftarrow \beta_2 \bar U + (1-\beta_2)|I - \bar I|

    with the new :math:`\bar I` in :math:`\bar U`. At the end of the turn, after its last update, each of the layer's
    subnets moves to the rows and columns with the largest sum of :math:`\bar I\,\bar U` that three greedy pairs find
    (`sparsity.best_subgrid`). What it has learned stays in the weight, in a dense fp32 accumulator of every weight that
    has a subnet: 4 bytes an entry, in memory and in files (2 with `values_dtype="bfloat16"`). The optimizer begins anew
    there, its step counter included; weight decay pulls what a subnet has learned since its last move.

    A layer without finite scores other than 0 keeps its subnets and is named in a warning. Dense are two fp32 matrices
    of each weight of the one layer whose turn it is, and with accumulation the sum of its gradients. The run's end is
    recorded with the number of entries that differ from the base (`changed`).

    Departures from the official code, all its faults: one step an update, not one a micro-batch; moments are dropped
    with their step counter; the first update of a layer sees its whole gradient; decay does not pull base weights.
    """

    every: PositiveInt = 100
    """Optimizer steps of a layer's turn, at whose end it moves (the paper: 50 to 150)."""
    importance: Literal["mix", "first", "second"] = "mix"
    r"""I: :math:`|a - a^2/2|`, :math:`|a|` or :math:`a^2`."""
    beta1: Annotated[float, Range(above=0, below=1)] = 0.85
    """Smoothing of the importance."""
    beta2: Annotated[float, Range(above=0, below=1)] = 0.85
    """Smoothing of its variation."""
    record: PositiveInt | None = None
    """Last steps of a turn that are read; None: all. At the default smoothing what came 20 steps before weighs 4 %."""
    asynchronous: bool = True
    """False: all layers are read in the first turn and move at its end, then wait for `L - 1` turns."""
    refined: bool = False
    """Whether the best greedy pair is improved in turns, rows and columns, until it no longer can be."""
    rate: Literal["cosine_restarts", "rewarm", "run"] = "cosine_restarts"
    """Learning rate of subnets. `cosine_restarts`: the paper's, from the run's base rate, whatever the run's own
    schedule (but where that is 0 nothing is updated): linear warm-up, then a cosine down to `floor`; after a move a
    linear rise over `every` steps to where the cosine was at the move. `rewarm`: that rise, times the run's own rate.
    `run`: the run's own."""
    warmup: Annotated[float, Range(least=0, below=1)] = 0.1
    """Fraction of the run in which `cosine_restarts` warms up; moves do not lower the rate there."""
    floor: Annotated[float, Range(least=0, below=1)] = 0.1
    """Where that cosine ends, as a fraction of the base rate."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"subnet_row", "subnet_column"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "trains"})
    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "accumulator"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.record is not None and self.record > self.every:
            raise ValueError(
                f"RelocateSubnets.record={self.record} is more than the {self.every} steps of a turn (every). Lower it."
            )

    # What follows from the options alone

    def turn_of(self, step: int, layers: int) -> list[int]:
        """Numbers of the layers whose turn step `step` (from 0) belongs to, of `layers`."""
        turn = step // self.every % layers
        if self.asynchronous:
            return [turn]
        return list(range(layers)) if turn == 0 else []

    def importance_of(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """I of each entry, of `weight`'s dtype and shape."""
        product = weight * gradient
        if self.importance == "first":
            return product.abs_()
        square = product.square()
        return square if self.importance == "second" else product.sub_(square, alpha=0.5).abs_()

    def rate_factor(self, step: int, total: int, moved: int | None) -> float:
        r"""Rate of a subnet at step `step` (from 0) of `total`, over the base rate (`cosine_restarts`) or the run's
        own; `moved`: steps done when it last moved, :math:`\rho`.

        With :math:`w` steps of warm-up and :math:`h(u) = f + (1-f)(1+\cos\pi u)/2`: :math:`t/w` for :math:`t < w`; then
        :math:`\frac{t-\rho}{T_s} h(\rho/(T-w))` for :math:`t-\rho < T_s`, else :math:`h((t-w)/(T-w))`. (The first h
        is not at :math:`(\rho-w)/(T-w)`: so the published code has it.)
        """
        rise = (step - moved) / self.every if moved is not None and step - moved < self.every else None
        if self.rate != "cosine_restarts":
            return 1.0 if self.rate == "run" or rise is None else rise
        warmup = self.warmup * total
        if step < warmup:
            return step / warmup

        def cosine(progress: float) -> float:
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2

        if rise is not None:
            return rise * cosine(moved / (total - warmup))
        return cosine((step - warmup) / (total - warmup))

    def check(self, config: Any) -> None:
        """Refuse an adapter without subnets."""
        super().check(config)
        if not getattr(config, "has_subnets", False):
            raise ValueError(
                "RelocateSubnets moves subnets, and no module has one. Set granularity='subnet', or leave the rule out."
            )

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """Both averages, fp32 `[out, in]`, while it is the layer's turn."""
        if space.kind != "subnet_row":
            return []
        return [TensorSpec(name, space.weight_shape, role="rule", passing=True) for name in _SCORES]

    # In training

    def begin(self, run: Run) -> None:
        """At least one move, and an update after it, must fit into the run."""
        run.memory.layers = _layers(run)
        run.saved.setdefault("moved", {})
        names = list(run.memory.layers)
        if self.every >= run.total_steps:
            raise ValueError(
                f"RelocateSubnets.every={self.every} is not less than the run's {run.total_steps} steps: no subnet "
                "would ever move. Train longer, lower it, or leave the rule out."
            )
        if not run.resumed:
            turns = (run.total_steps - 1) // self.every
            idle = [name or "outside of layers" for at, name in enumerate(names) if self.asynchronous and at >= turns]
            report_idle(
                idle,
                len(names),
                f"RelocateSubnets.every={self.every} leaves {turns} moves in {run.total_steps} steps: subnets stay",
                "Lower every, or train longer.",
            )
        if self.rate != "run":
            scaled = [rows for pairs in run.memory.layers.values() for rows, _ in pairs]
            run.updates.scale_part(run, [(rows.values, partial(self._factors, run, rows)) for rows in scaled])

    def _factors(self, run: Run, space: UnitSpace) -> Tensor | None:
        factor = self.rate_factor(run.step, run.total_steps, run.saved["moved"].get(space.name))
        if self.rate == "cosine_restarts":
            group = run.group(space.values)
            if not group["lr"]:
                return None
            factor *= float(group.get("initial_lr", group["lr"])) / float(group["lr"])
        return None if factor == 1 else torch.full_like(space.values, factor)

    def before_step(self, run: Run) -> None:
        """Read dense gradients of the layer whose turn it is."""
        offset, first = run.step % self.every, self.every - (self.record or self.every)
        if offset < first or run.step - offset + self.every >= run.total_steps:
            return  # before what is read, or in a turn after which no update follows
        for rows, _ in self._pairs(run, run.step):
            if offset == first:
                rows.free_state(_SCORES)
            rows.allocate_state(self, _SCORES)
            if rows.trains:
                device, take = rows.values.device, partial(self._take, rows)
                accumulation = run.training.accumulation
                reader = StepGradientReader(accumulation, run.loss_scale, rows.weight_shape, device, take)
                run.read_gradient(rows, reader)

    def _pairs(self, run: Run, step: int) -> list[tuple[UnitSpace, UnitSpace]]:
        layers = list(run.memory.layers.values())
        return [pair for at in self.turn_of(step, len(layers)) for pair in layers[at]]

    @torch.no_grad()
    def _take(self, rows: UnitSpace, gradient: Tensor) -> None:
        current = self.importance_of(rows.current_weight(), gradient.float())
        if bool(torch.isfinite(current).all()):
            state = rows.state()
            self._smoothed.take(current, *[state[name] for name in _SCORES])

    @property
    def _smoothed(self) -> Smoothed:
        return Smoothed(beta1=self.beta1, beta2=self.beta2)

    def after_step(self, run: Run) -> None:
        """At a turn's end, move the subnets of its layer."""
        if run.step % self.every or run.step >= run.total_steps:
            return
        pairs = [pair for pair in self._pairs(run, run.step - 1) if pair[0].trains]
        scores = {rows: self._score(rows) for rows, _ in pairs}
        judged = run.with_evidence(list(scores), lambda rows: is_evidence(scores[rows]), "the subnet was not moved")
        moved = {rows.name: self._move(run, rows, columns, scores[rows]) for rows, columns in pairs if rows in judged}
        for rows, _ in self._pairs(run, run.step - 1):
            rows.free_state(_SCORES)
        if pairs:
            run.record(moved=sorted(moved), entered=sum(moved.values()))

    def _score(self, rows: UnitSpace) -> Tensor | None:
        state = rows.state()
        kept = [state[name] for name in _SCORES if name in state]
        return self._smoothed.read(*kept) if len(kept) == 2 else None

    @torch.no_grad()
    def _move(self, run: Run, rows: UnitSpace, columns: UnitSpace, score: Tensor) -> int:
        """Rows and columns that entered."""
        seed = stream_seed(run.seed, "relocate", run.step, rows.name)
        found = best_subgrid(score, rows.capacity, columns.capacity, refined=self.refined, seed=seed)
        rows.accumulate()
        restart_optimizer_state(run.optimizer, rows.values)
        entered = 0
        for space, units in zip((rows, columns), found, strict=True):
            units = from_first_rank(units.to(space.alive().dtype))
            entered += move_units(space, units, run.optimizer).entered
        run.saved["moved"][rows.name] = run.step
        return entered

    def finish(self, run: Run) -> None:
        """Record how many entries of the weights differ from the base, and how many they have."""
        spaces = [rows for pairs in run.memory.layers.values() for rows, _ in pairs]
        run.record(
            changed=sum(space.changed_entries() for space in spaces),
            entries=sum(math.prod(space.weight_shape) for space in spaces),
        )


def _layers(run: Run) -> dict[str, list[tuple[UnitSpace, UnitSpace]]]:
    """Rows and columns of each subnet by the layer that it lies in, what lies in none first, in model order."""
    columns = {id(space.layer): space for space in run.spaces("subnet_column", training=False)}
    found: dict[str, list[tuple[UnitSpace, UnitSpace]]] = {}
    for rows in sorted(run.spaces("subnet_row", training=False), key=lambda space: bool(block_of(space.name))):
        found.setdefault(block_of(rows.name), []).append((rows, columns[id(rows.layer)]))
    return found
