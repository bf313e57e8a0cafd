"""What a pass over data adds up of one weight: its gradients, or what flows in and out of its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..utils.option_types import PositiveInt, check_types

State = dict[str, Tensor]
"""fp32 tensors by name: what a statistic knows of one weight."""


@dataclass(frozen=True)
class Statistic:
    r"""What a pass over data adds up of one weight `[rows, cols]`; here the sum of its gradients,
    :math:`\sum_i \nabla_W \ell_i` over labelled tokens (examples where labels are no tokens), `state["sum"]`.

    `start` makes the state, fp32 tensors by name; `update` takes dense gradients or, with `reads_activations`,
    `observe` takes what flows in and out of the layer; states of several ranks are added up, and `finish` closes them.
    `training.calibration.read_statistics` feeds them from the training data.
    """

    examples: PositiveInt = 128
    """Examples that the statistic is estimated from, over all ranks together."""

    per_example: ClassVar[bool] = False
    """Whether `update` wants the gradient of one example at a time."""
    per_step: ClassVar[bool] = False
    """Whether `update` wants the gradient of a whole optimizer step, averaged over ranks. Else it is fed with sums over
    micro-batches, and the states of ranks are added up at the end."""
    over_labels: ClassVar[bool] = False
    """Whether `update` wants gradients for all labels that the model could give instead of those of the loss."""
    reads_weight: ClassVar[bool] = False
    """Whether `update` reads the weight."""
    reads_activations: ClassVar[bool] = False
    """Whether `observe` wants inputs and outputs of the layer, and no gradient is needed."""

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def state_numel(self, rows: int, cols: int) -> int:
        """fp32 numbers that `start` allocates for a weight of that shape."""
        return rows * cols

    def step_numel(self, rows: int, cols: int) -> int:
        """With `per_step`, fp32 numbers that the gradient of an unfinished step takes."""
        return rows * cols

    @property
    def steps_read(self) -> int | None:
        """With `per_step`, the optimizer steps that it is estimated from, where it counts steps and not `examples`."""
        return None

    def reduce(self, gradient: Tensor) -> Tensor:
        """A linear function of a dense gradient that is all that `update` takes; the gradient itself by default. It is
        applied before gradients are added up, so that sums are as small as it makes them."""
        return gradient

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """What is known of a `[rows, cols]` weight before any data."""
        return {"sum": torch.zeros(rows, cols, device=device)}

    def update(self, state: State, gradient: Tensor, weight: Tensor | None = None) -> None:
        """Take a dense fp32 gradient `[rows, cols]`, or what `reduce` made of it, into `state`, in place; may overwrite
        `gradient`."""
        state["sum"].add_(gradient)

    def observe(self, state: State, inputs: Tensor, outputs: Tensor) -> None:
        """Take inputs `[tokens, cols]` and outputs `[tokens, rows]`, any float dtype, into `state`, in place."""
        raise NotImplementedError

    def finish(self, state: State, count: int) -> None:
        """Close a state that was added up over `count` items on all ranks together: labelled tokens (examples where
        labels are no tokens), with `per_example` examples or their labels, with `per_step` steps, with
        `reads_activations` tokens."""


@dataclass(frozen=True)
class MeanGradient(Statistic):
    r"""The mean loss's gradient, :math:`\frac{1}{n} \sum_{i=1}^n \nabla_W \ell_i`, `state["mean"]` `[rows, cols]`."""

    def start(self, rows: int, cols: int, device: torch.device | str = "cpu") -> State:
        """Nothing read."""
        return {"mean": torch.zeros(rows, cols, device=device)}

    def update(self, state: State, gradient: Tensor, weight: Tensor | None = None) -> None:
        """Add a gradient."""
        state["mean"].add_(gradient)

    def finish(self, state: State, count: int) -> None:
        """Divide the sum by what it is a sum over."""
        state["mean"].div_(max(count, 1))


@dataclass(frozen=True)
class MeanStepGradient(MeanGradient):
    r"""The mean over `steps` optimizer steps of the gradients of their mean losses, :math:`\frac{1}{T} \sum_t G_t`,
    `state["mean"]` `[rows, cols]`. A step that has no gradient for a weight, or none that is finite, counts as 0."""

    steps: PositiveInt = 32
    """Optimizer steps that are read; `examples` is not."""

    per_step: ClassVar[bool] = True

    @property
    def steps_read(self) -> int:
        """`steps`."""
        return self.steps

    def finish(self, state: State, count: int) -> None:
        """Divide the sum by the number of steps."""
        state["mean"].div_(self.steps)
