"""Scores of units by what their numbers do to the loss: parts of a rule, with state that follows the units."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor, nn

from ..utils.option_types import PositiveInt, Range
from ..utils.parts import Part, register_part
from ..utils.tensors import TensorSpec
from .collectives import all_reduce_mean
from .evidence import is_evidence
from .gradient_readers import StepSumReader
from .space import UnitSpace

if TYPE_CHECKING:
    from .run import Run


@dataclass(frozen=True)
class TrainingScore(Part):
    """Base of the scores of trained numbers: how much each matters, fp32 `>= 0`, from the number and its gradient.

    `update` is called after every optimizer step, when the weights are those after it and the gradients those that it
    used: averaged over ranks, unscaled, clipped. A step whose scores are missing or not finite in some parameter of a
    space (it did not run, or an fp16 overflow skipped the step) changes nothing there. A rule that takes any score
    calls `before_step` too.
    """

    part_kind: ClassVar[str] = "training_score"

    averages: ClassVar[tuple[str, ...]] = ("score",)
    """Names of what is kept of each parameter, in its shape."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """As `Rule.needs`: `gradient` where a module has one score, from the dense gradient of its weight, instead of one
    for each of its numbers."""

    def shapes(self, space: UnitSpace) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """Shapes of what is scored, by name, with the axis that units lie along. First what switches units on."""
        return {name: (tuple(one.shape), axis) for name, (one, axis) in space.scored_parameters().items()}

    def before_step(self, run: Run, spaces: list[UnitSpace]) -> None:
        """Read what the scores of the coming step need beyond the gradients of parameters."""

    def measure(self, run: Run, spaces: list[UnitSpace]) -> list[dict[str, Tensor | None]]:
        """Scores at this step of each space, by the names of `shapes`; None as in `of`."""
        return [{name: self.of(p) for name, (p, _) in space.scored_parameters().items()} for space in spaces]

    def of(self, parameter: nn.Parameter) -> Tensor | None:
        """Scores of a parameter's numbers at this step, in its shape; None where it has no gradient to tell."""
        raise NotImplementedError

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """What a rule keeps for this score: fp32, in the shapes of what is scored in `space`."""
        return [
            TensorSpec(
                f"{kept}_{name}", shape, role="rule", space=space.kind if axis is not None else None, axis=axis or 0
            )
            for kept in self.averages
            for name, (shape, axis) in self.shapes(space).items()
        ]

    @torch.no_grad()
    def update(self, run: Run, spaces: list[UnitSpace]) -> None:
        """Take one optimizer step."""
        for space, current in zip(spaces, self.measure(run, spaces), strict=True):
            if any(scores is None or not torch.isfinite(scores).all() for scores in current.values()):
                continue
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
        """Scores of all numbers, by parameter; of a module one, "module"."""
        state = space.state()
        return {
            name: self.read(*[state[f"{kept}_{name}"].to(dtype) for kept in self.averages])
            for name in self.shapes(space)
        }

    def module_score(self, space: UnitSpace) -> float:
        """The score of the module: the sum over its numbers, in fp64."""
        return float(sum(scores.sum() for scores in self.numbers(space, torch.float64).values()))

    def has_evidence(self, space: UnitSpace) -> bool:
        """Whether the numbers that switch units on had a gradient; others may have one from a regulariser alone."""
        first = next(iter(self.shapes(space)))
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


@register_part("module_sensitivity")
@dataclass(frozen=True)
class ModuleSensitivity(TrainingScore):
    r""":math:`\sum|\Delta W \odot \partial L/\partial\Delta W| / \sqrt{mn}`, one score for a module `[m, n]`
    (IncreLoRA; Zhang et al., 2023): of the loss alone, unclipped, with the update of before the step, averaged over
    ranks.

    One dense gradient of each layer at a time; with accumulation, an fp32 sum of every layer's until the step ends.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def shapes(self, space: UnitSpace) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """One number, "module"."""
        return {"module": ((1,), None)}

    def before_step(self, run: Run, spaces: list[UnitSpace]) -> None:
        """Read the dense gradients."""
        for space in spaces:
            run.read_gradient(space, StepSumReader(run.training.accumulation, partial(_product, space)))

    def measure(self, run: Run, spaces: list[UnitSpace]) -> list[dict[str, Tensor | None]]:
        """The sums, over the root of the weight's size."""
        if not spaces:
            return []
        devices = [space.parameters()[0].device for space in spaces]
        sums = [torch.as_tensor(run.readers[s].total, dtype=torch.float64, device=devices[0]) for s in spaces]
        sums = all_reduce_mean(torch.stack(sums)).float()
        return [{"module": one.to(device)} for one, device in zip(sums.split(1), devices, strict=True)]


def _product(space: UnitSpace, dense: Tensor) -> Tensor:
    return (space.delta() * dense).abs().sum() / dense.numel() ** 0.5


class _Averaged(TrainingScore):
    """Averages of another score, its option `score`, which says what is measured."""

    score: TrainingScore

    @property
    def needs(self) -> frozenset[str]:
        """As the score that is averaged."""
        return self.score.needs

    def shapes(self, space: UnitSpace) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """As the score that is averaged."""
        return self.score.shapes(space)

    def before_step(self, run: Run, spaces: list[UnitSpace]) -> None:
        """As the score that is averaged."""
        self.score.before_step(run, spaces)

    def measure(self, run: Run, spaces: list[UnitSpace]) -> list[dict[str, Tensor | None]]:
        """The score that is averaged."""
        return self.score.measure(run, spaces)


@register_part("smoothed")
@dataclass(frozen=True)
class Smoothed(_Averaged):
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

    def take(self, current: Tensor, sensitivity: Tensor, uncertainty: Tensor) -> None:
        """One step of both averages, in place."""
        sensitivity.mul_(self.beta1).add_(current, alpha=1 - self.beta1)
        uncertainty.mul_(self.beta2).add_((current - sensitivity).abs_(), alpha=1 - self.beta2)

    def read(self, sensitivity: Tensor, uncertainty: Tensor) -> Tensor:
        """Their product."""
        return sensitivity * uncertainty


@register_part("windowed")
@dataclass(frozen=True)
class Windowed(_Averaged):
    r"""Moving average of another score's means over windows of `steps` steps (LoSparse; Li et al., 2023): where a new
    window begins, the mean of the one before enters,
    :math:`\bar I \leftarrow \beta_1 \bar I + (1-\beta_1)\,\bar\imath`, without bias correction; so it is 0 in the first
    window. State: two fp32 tensors in the shape of each parameter.

    With `beta2` it is times an average of :math:`|\bar\imath - \bar I|` (PLATON; an option of LoSparse's code), and
    three tensors are kept.
    """

    score: TrainingScore = field(default_factory=Sensitivity)
    """What is averaged."""
    steps: PositiveInt = 10
    """Length of a window."""
    beta1: Annotated[float, Range(above=0, below=1)] = 0.85
    """Smoothing over windows."""
    beta2: Annotated[float, Range(above=0, below=1)] | None = None
    """Smoothing of the uncertainty; None: without it."""

    @property
    def averages(self) -> tuple[str, ...]:
        """What is kept of each parameter."""
        return ("smoothed", "window") if self.beta2 is None else ("smoothed", "window", "uncertainty")

    @torch.no_grad()
    def update(self, run: Run, spaces: list[UnitSpace]) -> None:
        """Close a window where one ends, and take one optimizer step."""
        if run.step % self.steps == 0:
            for space in spaces:
                state = space.state()
                for name in self.shapes(space):
                    self._close(*[state[f"{kept}_{name}"] for kept in self.averages])
        super().update(run, spaces)

    def _close(self, smoothed: Tensor, window: Tensor, uncertainty: Tensor | None = None) -> None:
        mean = window.div_(self.steps)
        smoothed.lerp_(mean, 1 - self.beta1)
        if uncertainty is not None:
            uncertainty.lerp_((mean - smoothed).abs_(), 1 - self.beta2)
        window.zero_()

    def take(self, current: Tensor, smoothed: Tensor, window: Tensor, uncertainty: Tensor | None = None) -> None:
        """Add a step to the window."""
        window.add_(current)

    def read(self, smoothed: Tensor, window: Tensor, uncertainty: Tensor | None = None) -> Tensor:
        """The average, times its uncertainty if that is kept."""
        return smoothed if uncertainty is None else smoothed * uncertainty
