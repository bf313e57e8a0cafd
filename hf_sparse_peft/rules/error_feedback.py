"""`ErrorFeedback`: weights train under a mask, and what is off the mask keeps learning beside it (DPF, FedDIP)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..utils.option_types import NonNegativeFloat
from ..utils.parts import register_part
from ..utils.tensors import TensorSpec
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("error_feedback")
@dataclass(frozen=True)
class ErrorFeedback(Rule):
    r"""Passes use :math:`M \odot V` with :math:`V = W + D`; its dense gradient, masked by nothing, is given to all of
    V, so that what is off the mask moves by what the pruned model's loss says of it (error feedback; Lin et al., 2020,
    DPF; the client's step of Long et al., 2023, FedDIP):

    .. math:: dV = G + \lambda \frac{\partial}{\partial V} \|M \odot V\|_p
              + \frac{\mu}{2} \frac{\partial}{\partial V} \|M \odot V - V_0\|_2 + \omega V

    Norms are of one weight each and not squared; off the mask they have no gradient. The last three terms are added
    once per optimizer step, after clipping. :math:`\omega V` is the weight decay of the weight itself: leave the
    optimizer's, which would pull D to 0, at 0. The mask is not moved here. An update that is no matrix gets the
    gradient through what it is.
    """

    penalty: NonNegativeFloat = 0.0
    r""":math:`\lambda` (FedDIP: grows over the rounds, `FedDIP.penalty`)."""
    norm: Literal["1", "2", "inf"] = "2"
    """p."""
    weight_decay: NonNegativeFloat = 0.0
    r""":math:`\omega`, of all entries (FedDIP: 5e-4)."""
    proximal: NonNegativeFloat = 0.0
    r""":math:`\mu`: a pull to the masked weight that the run began with; with it, one more copy of the weights is kept
    while the rule runs."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"mask"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient", "forward"})

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        r"""`reference` `[out, in]`, :math:`V_0`, where there is a pull to it."""
        return [TensorSpec("reference", space.weight_shape, role="rule")] if self.proximal else []

    def begin(self, run: Run) -> None:
        """Keep the weights to be pulled to."""
        if self.proximal and not run.resumed:
            for space in run.spaces(training=False):
                run.state(space)["reference"].copy_(self._kept(space))

    def before_step(self, run: Run) -> None:
        """What is off the mask gets all of the gradient in the passes of this step."""
        run.for_this_step([_straight_through(space) for space in run.spaces()])

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add the norms' and the decay's."""
        for space in run.spaces():
            added: list[Tensor] = []
            if self.penalty:
                added.append(self.penalty * norm_gradient(self._kept(space), self.norm))
            if self.proximal:
                change = self._kept(space) - run.state(space)["reference"]
                added.append(self.proximal / 2 * norm_gradient(change, "2"))
            if self.weight_decay:
                added.append(self.weight_decay * space.current_weight())
            if added:
                space.add_gradient(sum(added), run.gradient_scale)

    @staticmethod
    def _kept(space: UnitSpace) -> Tensor:
        return torch.where(space.layer.kept(space.adapter), space.current_weight(), 0)


def norm_gradient(matrix: Tensor, norm: str = "2") -> Tensor:
    """The gradient of one norm of all entries, of the matrix' shape; 0 where all are 0. `inf`: entries that tie for the
    largest share it."""
    if norm == "1":
        return matrix.sign()
    if norm == "inf":
        largest = matrix.abs() == matrix.abs().max()
        return matrix.sign() * largest / largest.sum()
    size = torch.linalg.vector_norm(matrix)
    return matrix / size if size > 0 else torch.zeros_like(matrix)


@contextmanager
def _straight_through(space: Any) -> Iterator[None]:
    space.numbers["removed_gradient"] = 1.0
    try:
        yield
    finally:
        space.numbers.pop("removed_gradient", None)
