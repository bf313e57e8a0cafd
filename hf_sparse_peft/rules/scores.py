"""Scores of units by what their numbers do to the loss: parts of a rule, with state that follows the units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ..utils.option_types import Range
from ..utils.parts import Part, register_part
from ..utils.tensors import TensorSpec
from .evidence import is_evidence
from .space import UnitSpace


@dataclass(frozen=True)
class TrainingScore(Part):
    """Base of the scores of trained numbers: how much each matters, fp32 `>= 0`, from the number and its gradient.

    `update` is called after every optimizer step, when the weights are those after it and the gradients those that it
    used: averaged over ranks, unscaled, clipped. A step whose scores are missing or not finite in some parameter of a
    space (it did not run, or an fp16 overflow skipped the step) changes nothing there.
    """

    part_kind: ClassVar[str] = "training_score"

    averages: ClassVar[tuple[str, ...]] = ("score",)
    """Names of what is kept of each parameter, in its shape."""

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """Scores of a parameter's numbers at this step, in its shape; None where it has no gradient to tell."""
        raise NotImplementedError

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """What a rule keeps for this score: fp32, in the shape of each scored parameter of `space`."""
        return [
            TensorSpec(
                f"{kept}_{name}", tuple(parameter.shape), role="rule", space=space.kind if axis is not None else None,
                axis=axis or 0,
            )
            for kept in self.averages
            for name, (parameter, axis) in space.scored_parameters().items()
        ]  # fmt: skip

    @torch.no_grad()
    def update(self, space: UnitSpace) -> None:
        """Take one optimizer step."""
        current = {name: self.of(parameter) for name, (parameter, _) in space.scored_parameters().items()}
        if any(scores is None or not torch.isfinite(scores).all() for scores in current.values()):
            return
        state = space.state()
        for name, scores in current.items():
            self.take(scores, *[state[f"{kept}_{name}"] for kept in self.averages])

    def take(self, current: Tensor, kept: Tensor) -> None:
        """Let `kept` know the scores of this step."""
        kept.copy_(current)

    def read(self, kept: Tensor) -> Tensor:
        """The score of each number, from what is kept."""
        return kept

    def numbers(self, space: UnitSpace, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Scores of all numbers, by parameter."""
        state = space.state()
        return {
            name: self.read(*[state[f"{kept}_{name}"].to(dtype) for kept in self.averages])
            for name in space.scored_parameters()
        }

    def has_evidence(self, space: UnitSpace) -> bool:
        """Whether the numbers that switch units on had a gradient; others may have one from a regulariser alone."""
        first = next(iter(space.scored_parameters()))
        finite = all(bool(torch.isfinite(scores).all()) for scores in self.numbers(space).values())
        return finite and is_evidence(space.state()[f"{self.averages[0]}_{first}"])


@register_part("sensitivity")
@dataclass(frozen=True)
class Sensitivity(TrainingScore):
    r""":math:`|w\,\partial L/\partial w|`: how much the loss changes when the number goes, to first order (Molchanov et
    al., 2019)."""

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """fp32, in the parameter's shape."""
        return None if parameter.grad is None else (parameter * parameter.grad).abs().float()


@register_part("magnitude")
@dataclass(frozen=True)
class Magnitude(TrainingScore):
    """:math:`|w|`."""

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """fp32, in the parameter's shape."""
        return parameter.detach().abs().float()


@register_part("smoothed")
@dataclass(frozen=True)
class Smoothed(TrainingScore):
    r"""Moving average of another score `I` times its uncertainty (Zhang et al., 2023), without bias correction:

    .. math:: \bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I, \quad
        \bar U \leftarrow \beta_2 \bar U + (1-\beta_2)|I - \bar I|, \quad s = \bar I\,\bar U

    with the new :math:`\bar I` in :math:`\bar U`. State: two fp32 tensors in the shape of each parameter.
    """

    score: TrainingScore = field(default_factory=Sensitivity)
    """What is smoothed."""
    beta1: Annotated[float, Range(above=0, below=1)] = 0.85
    """Smoothing of the score."""
    beta2: Annotated[float, Range(above=0, below=1)] = 0.85
    """Smoothing of the uncertainty."""

    averages: ClassVar[tuple[str, ...]] = ("sensitivity", "uncertainty")

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """The score that is smoothed."""
        return self.score.of(parameter)

    def take(self, current: Tensor, sensitivity: Tensor, uncertainty: Tensor) -> None:
        """One step of both averages, in place."""
        sensitivity.mul_(self.beta1).add_(current, alpha=1 - self.beta1)
        uncertainty.mul_(self.beta2).add_((current - sensitivity).abs_(), alpha=1 - self.beta2)

    def read(self, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        """Their product."""
        return sensitivity * uncertainty
