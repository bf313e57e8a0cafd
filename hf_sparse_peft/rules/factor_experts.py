"""`FactorExperts`: every training pass uses one expert of each split low-rank factor, drawn anew (MoSA)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..utils.option_types import NonNegativeFloat
from ..utils.parts import register_part
from .rule import Rule
from .run import Run
from .space import UnitSpace


@dataclass
class ExpertDraw:
    """What the experts of a forward pass are drawn by: one object a run and adapter, which its layers share."""

    step: int
    micro_batch: int = 0
    number: int = 0
    """Which pass over the micro-batch, 0 or 1."""
    consistency: NonNegativeFloat = 0.0
    """Weight of the divergence between two passes; 0: there is one pass."""

    def passes(self) -> Iterator[tuple[int, int, int]]:
        """(step, micro-batch, pass) of all passes over the current micro-batch."""
        return ((self.step, self.micro_batch, number) for number in range(2 if self.consistency else 1))


@register_part("factor_experts")
@dataclass(frozen=True)
class FactorExperts(Rule):
    r"""Trains one expert of each factor at a time, of adapters whose factors `factor_masks` of kind "stochastic" splits
    (MoSA; Zhang et al., 2023).

    Every forward pass of training uses one expert of each factor and layer; the draw is a hash of seed, module, step,
    micro-batch and pass: the same on every rank, in recomputation and after a resume. Evaluation, and training without
    this rule, use the merge of all experts. Entries of experts that a step did not draw keep value and optimizer
    moments bit for bit, weight decay included, as if they had no gradient. One thing differs from experts with
    parameters of their own: a scalar `step` of the optimizer counts all steps, so the first steps of an expert that was
    drawn late are smaller than bias correction would make them.
    """

    consistency: float = 1.0
    """Weight of the symmetric KL divergence between two passes with draws of their own; needs
    `hf_sparse_peft.training.TwoPassTrainer` (`trainer_class_for(model)`). 0 trains with one pass."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"forward", "trains"})

    @property
    def needs(self) -> frozenset[str]:
        """Split factors, and a second pass where passes are compared."""
        return frozenset({"experts", "fixed_units"} | ({"two_passes"} if self.consistency else set()))

    def check(self, config: Any) -> None:
        """Refuse an adapter whose factors are not split."""
        masks = getattr(config, "factor_masks", None)
        if masks is None or masks.kind != "stochastic":
            raise ValueError(
                f"FactorExperts draws experts of split factors, and factor_masks={masks} splits none. Set "
                "factor_masks=FactorMaskConfig(kind='stochastic') in a SparseLoraConfig, or leave the rule out."
            )

    # In training

    def begin(self, run: Run) -> None:
        """Two passes need a loop that makes them."""
        if self.consistency and "two_passes" not in run.training.provides:
            raise ValueError(
                f"FactorExperts.consistency={self.consistency} compares two passes of a batch, and this Trainer makes "
                "one. Use hf_sparse_peft.training.TwoPassTrainer (trainer_class_for(model) gives it), or set "
                "consistency=0."
            )
        run.memory.draw, run.memory.passes = ExpertDraw(run.step, consistency=self.consistency), []
        spaces = run.spaces(training=False)
        for space in spaces:
            space.draw_experts(run.memory.draw)
        held = [(p, partial(_not_drawn, run, space, factor)) for space in spaces for factor, p in space.split_factors()]
        run.updates.hold_part(run, held)

    def before_step(self, run: Run) -> None:
        """The first micro-batch's draw."""
        run.memory.passes = []
        self._draw(run, 0)

    def after_micro_batch(self, run: Run) -> None:
        """The next micro-batch's draw."""
        self._draw(run, run.memory.draw.micro_batch + 1)

    def _draw(self, run: Run, micro_batch: int) -> None:
        draw = run.memory.draw
        draw.step, draw.micro_batch, draw.number = run.step, micro_batch, 0
        run.memory.passes += draw.passes()

    def release(self, run: Run) -> None:
        """From here on every forward pass uses the merge."""
        for space in run.spaces(training=False):
            space.draw_experts(None)


def _not_drawn(run: Run, space: UnitSpace, factor: str) -> Tensor | None:
    """Bool, of the factor's shape: entries of experts that no pass of this step has drawn so far."""
    drawn = sorted({space.drawn_expert(factor, one) for one in run.memory.passes})
    owners = space.expert_map(factor)
    return ~torch.isin(owners, torch.tensor(drawn, dtype=owners.dtype, device=owners.device)) if drawn else None
