r"""How a mask enters the passes of a layer: :math:`Y = X (M \odot V)^\top` with :math:`V = W + D`.

A rule decides which entries live, and by numbers of the step (`MaskSpace.numbers`) what removed ones count and get:
`removed_weight`, `removed_gradient`. What needs more is a masking, a part that anybody may register, in one file, from
outside too. A mask that pulls what it removes towards 0:

    @register_part("pulled")
    @dataclass(frozen=True)
    class Pulled(Masking):
        '''Straight-through, and 0.01 V for what is removed.'''

        def weight_gradient(self, of, gradient, mask):
            return gradient + 0.01 * of.dense * ~mask

`of` (`MaskedWeight`) has the base weight, D, V, the stored mask, the adapter's tensors and the numbers of the step.
With `computes_mask` no bits are stored: `mask` follows from V or from trained scores (`trained`, `specs`, `gradients`)
and from how many entries live, `of.count`, which rules move along their curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...utils.parts import register_part
from .updates import BringsTensors
from .weight import MaskedWeight


@dataclass(frozen=True)
class Masking(BringsTensors):
    r"""Base of the maskings; as it is, M is what is stored, in forward and backward alike.

    With :math:`G = dY^\top X`, the dense gradient: :math:`dX = dY (M_b \odot V)`, :math:`dV = M \odot G`.
    """

    part_kind: ClassVar[str] = "masking"
    computes_mask: ClassVar[bool] = False
    """Whether M is computed in every pass, from V or scores, instead of stored as bits. How many entries live is
    stored then (`MaskedWeight.count`), and all rules say is that number."""

    def mask(self, of: MaskedWeight) -> Tensor:
        """M of the forward pass `[out, in]`: bool, or numbers that V is multiplied by. Here what is stored, and
        `removed_weight` instead of 0 where a rule sets that number."""
        beta = of.numbers.get("removed_weight", 0.0)
        return of.kept.float().clamp_(min=beta) if beta else of.kept

    def input_mask(self, of: MaskedWeight, mask: Tensor) -> Tensor:
        r""":math:`M_b`, the mask of the weight that the gradient of the input goes through; `mask` is the forward's.
        Here that, unless the space has another one (`MaskSpace.write_input_bits`)."""
        return mask if of.input_bits is None else of.unpacked(of.input_bits)

    def weight_gradient(self, of: MaskedWeight, gradient: Tensor, mask: Tensor) -> Tensor:
        """dV `[out, in]`, from the dense gradient G: here G where M is 1 and 0 where it is not, or `removed_gradient`
        times G there, where a rule sets that number (1: straight-through). G is only lent: change copies."""
        factor = of.numbers.get("removed_gradient", 0.0)
        if factor == 1.0:
            return gradient
        kept = mask if mask.dtype == torch.bool else mask == 1
        return torch.where(kept, gradient, gradient * factor if factor else 0)

    def gradients(self, of: MaskedWeight, gradient: Tensor, mask: Tensor) -> dict[str, Tensor]:
        r"""The gradients of its own `trained` tensors, by name, from G. Movement scores: :math:`G \odot V`."""
        return {}


@register_part("hard")
@dataclass(frozen=True)
class HardMask(Masking):
    """What is removed is 0 and gets no gradient: the mask of the forward pass is that of both gradients."""
