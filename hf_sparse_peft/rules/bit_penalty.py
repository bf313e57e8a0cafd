"""`BitPenalty`: a price on every bit of a weight that trains through its own quantiser (self-compression)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..utils.option_types import PositiveFloat
from ..utils.parts import register_part
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("bit_penalty")
@dataclass(frozen=True)
class BitPenalty(Rule):
    r"""A price on the mean bit depth of a weight, :math:`\gamma Q` with :math:`Q = \sum_i \max(b_i, 0)\,n_i / N` over
    the channels of all adapted layers, `n_i` numbers each of `N` (self-compression; Csefalvay and Imber, 2023).

    Its gradient, :math:`\gamma n_i / N` where :math:`b_i > 0`, is added once per optimizer step, after clipping; Q does
    not show in the loss. Layers that have no gradient at a step, or are held still, are not pulled. A channel at 0 bits
    has no gradient at all and never returns; bit depths and exponents have no weight decay.

    With Adam a bit depth moves by about a learning rate a step, so that 8 bits take `8 / (rate * lr)` steps to leave:
    `rate` makes that short where the weight itself is to be tuned with care.
    """

    weight: PositiveFloat = 0.015
    r""":math:`\gamma` (paper, as recalled: 0.015 on CIFAR-10; a reproduction on MNIST: 0.05)."""
    rate: PositiveFloat = 1.0
    """Learning rate of bit depths and exponents over the run's."""
    over: Literal["weights", "parameters"] = "weights"
    """`N`: numbers of the weights, or these with one bit depth and one exponent a channel (the reproduction)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"channel"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})
    undecayed: ClassVar[frozenset[str]] = frozenset({"bits", "exponents"})

    def begin(self, run: Run) -> None:
        """Count the numbers, and set the learning rate."""
        spaces = run.spaces(training=False)
        counted = [space.unit_entries if self.over == "weights" else space.unit_numel for space in spaces]
        run.memory.numel = sum(space.size * numel for space, numel in zip(spaces, counted, strict=True))
        if self.rate != 1:
            run.scale_updates(self._factor)

    def _factor(self, space: UnitSpace, parameter: nn.Parameter) -> Tensor | None:
        if any(parameter is space.scored_parameters()[name][0] for name in self.undecayed):
            return torch.full((space.size,), self.rate, device=parameter.device)
        return None

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Pull the bit depths."""
        for space in run.spaces():
            if space.bits.grad is not None:
                pull = run.gradient_scale * self.weight * space.unit_entries / run.memory.numel
                space.bits.grad.add_((space.bits > 0).to(space.bits.grad), alpha=pull)

    def finish(self, run: Run) -> None:
        """Note what is left."""
        spaces = run.spaces(training=False)
        numel = sum(space.size * space.unit_entries for space in spaces)
        bits = sum(float(space.bits.detach().clamp_min(0).sum()) * space.unit_entries for space in spaces)
        pruned = sum(space.size - space.count for space in spaces)
        run.record(mean_bits=bits / numel, pruned_channels=pruned)
