"""`MaskSparsity`: an L1 pull on the units that are to go, and on no others (MaskSparsity)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..sparsity import stream_seed, top_units
from ..utils.option_types import Decay, NonNegativeFloat, PositiveFraction, Range
from ..utils.parts import register_part, require
from ..utils.tensors import TensorSpec
from .evidence import is_evidence
from .groups import keep_dead_at_zero, places
from .moves import move_units
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("mask_sparsity")
@dataclass(frozen=True)
class MaskSparsity(Rule):
    r"""A pruner first says which units go, and only these are then pulled to 0 while all train on:
    :math:`\nabla\gamma \mathrel{+}= s\,\mathrm{sign}(\gamma)` on them before every update, after clipping, until they
    are removed (MaskSparsity; Jiang et al., 2023).

    At `start` of the run the units that change the weight least, by their largest |entry|, are marked; at `end` they
    leave, and what is left is fine-tuned. Every number of an unmarked unit has the gradient of plain training, to the
    bit. Momentum and weight decay see the sum. The paper pulls the scales of norms before channels; here
    :math:`\gamma` is the gate of a low-rank component, or the values of a support's unit. A layer whose units are all 0
    or not finite at `start` has none marked and is named in a warning; layers that are held still are pulled, and lose
    their units, when they train.
    """

    weight: NonNegativeFloat = 5e-4
    """s (MaskSparsity: 5e-4)."""
    fraction: Annotated[float, Range(above=0, below=1)] = 0.5
    """Fraction of the living units that goes."""
    start: Decay = 0.25
    """Where units are marked, as a fraction of the run; before it is the baseline's training."""
    end: PositiveFraction = 0.75
    """Where they leave, as a fraction of the run."""
    penalty: Literal["l1", "l2"] = "l1"
    r""":math:`\mathrm{sign}(\gamma)`, or :math:`\gamma`."""
    scope: Literal["layer", "global"] = "global"
    """Whether every layer loses the same fraction, or units of all layers compete, those of each kind among themselves.
    """

    acts_on: ClassVar[frozenset[str]] = frozenset({"support", "rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "gradient"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    gate: ClassVar[str] = "ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.start < self.end, self, "start", f"a fraction of the run from 0 to below end={self.end}")

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """uint8 `[capacity]`: 1 for units that are to go."""
        return [TensorSpec(f"marked_{space.kind}", (space.capacity,), torch.uint8, "rule", space=space.kind)]

    def _window(self, run: Run) -> tuple[int, int]:
        return round(self.start * run.total_steps), round(self.end * run.total_steps)

    def begin(self, run: Run) -> None:
        """The window must hold a step; units that an adapter brings trained may be marked at once.

        Raises:
            ValueError: the run is too short.
        """
        first, last = self._window(run)
        if last <= first:
            raise ValueError(
                f"MaskSparsity.start={self.start} and end={self.end} leave no step in a run of {run.total_steps}. "
                "Train longer or widen the window."
            )
        if first == 0 and not run.resumed:
            self._mark(run)

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Pull what is marked."""
        first, last = self._window(run)
        if not first <= run.step < last:
            return
        for space in run.spaces():
            parameter, marked = switch_of(space), self._marked(space)
            if parameter.grad is None or not marked.numel():
                continue
            numbers = parameter.detach()[marked]
            pull = numbers.sign() if self.penalty == "l1" else numbers
            parameter.grad.index_add_(0, marked, pull.to(parameter.grad), alpha=run.gradient_scale * self.weight)

    def after_update(self, run: Run) -> None:
        """What has left stays 0."""
        for space in run.spaces():
            keep_dead_at_zero(space)

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Mark, or remove."""
        first, last = self._window(run)
        if run.step == first:
            self._mark(run)
        left = 0
        for space in run.spaces() if run.step >= last else ():  # others follow when they train
            gone = self._marked(space)
            if gone.numel():
                stays = (_marks(space) == 0)[places(space)]
                _marks(space).zero_()
                left += move_units(space, space.alive()[stays.to(space.alive().device)], run.optimizer).left
        if left:
            run.record(pruned=left, alive=sum(space.count for space in run.spaces(training=False)))

    def _mark(self, run: Run) -> None:
        spaces = run.spaces(training=False)
        spaces = [space for space in spaces if space.count]
        judged = run.with_evidence(spaces, lambda s: is_evidence(s.largest_entries()), "no unit was marked")
        together = [[space] for space in judged]
        if self.scope == "global":
            together = [[s for s in judged if s.kind == kind] for kind in sorted({s.kind for s in judged})]
        for spaces in together:
            sizes = [space.largest_entries() for space in spaces]
            every = torch.cat([one.cpu() for one in sizes])
            seed = stream_seed(run.seed, "mask sparsity", spaces[0].kind, spaces[0].name)
            gone = torch.zeros(every.numel(), dtype=torch.bool)
            gone[top_units(-every, round(self.fraction * every.numel()), seed=seed).long()] = True
            for space, mine, size in zip(spaces, gone.split([one.numel() for one in sizes]), sizes, strict=True):
                if space.packed and mine.all():
                    mine[size.argmax()] = False
                marked = _marks(space)
                marked.zero_()
                marked[places(space)[mine.to(marked.device)]] = 1
        run.record(marked=sum(int(_marks(space).sum()) for space in judged))

    @staticmethod
    def _marked(space: UnitSpace) -> Tensor:
        return _marks(space).nonzero().squeeze(1)


def _marks(space: UnitSpace) -> Tensor:
    return space.state()[f"marked_{space.kind}"]


def switch_of(space: UnitSpace) -> nn.Parameter:
    """The parameter that switches units on: a gate, or the values."""
    return next(iter(space.scored_parameters().values()))[0]
