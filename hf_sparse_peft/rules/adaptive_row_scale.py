"""`AdaptiveRowScale`: rows of the update that are small learn faster (ALLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import linear

from ..utils.option_types import PositiveFloat
from ..utils.parts import register_part
from .forward_terms import added_to_output, product_row_norms
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("adaptive_row_scale")
@dataclass(frozen=True)
class AdaptiveRowScale(Rule):
    r"""Row i of the gradient of the *product* :math:`\Delta W` is multiplied by
    :math:`s_i = 1/\sqrt{\|\Delta W_i\|_2 + 1/h^2}` (ALLoRA; Huang & Balestriero, 2024), whose norm is not squared:
    :math:`\partial B = \mathrm{diag}(s)\,G A^\top` and :math:`\partial A = B^\top \mathrm{diag}(s)\,G`, while the
    input's gradient is the plain one.

    Adam divides by the size of gradients, so that there most of a row's factor in `B` cancels.
    """

    max_scale: PositiveFloat = 1.0
    r"""h, the factor of a row that is 0 (the authors take :math:`h^2` of 1, 2 or 4)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})
    needs: ClassVar[frozenset[str]] = frozenset({"scaling"})

    def check(self, config: Any) -> None:
        """Refuse dropout, whose input the rule does not see."""
        if config.lora_dropout:
            raise ValueError(
                f"AdaptiveRowScale scales gradients of the whole input, and lora_dropout={config.lora_dropout} hides "
                "parts of it. Set lora_dropout=0, as published."
            )

    def before_step(self, run: Run) -> None:
        """Scale the gradients of this step's passes."""
        run.for_this_step(added_to_output(space, partial(self._term, space)) for space in run.all_spaces)

    def _term(self, space: UnitSpace, x: Tensor) -> Tensor:
        """0, whose gradients are what the product's lack."""
        left, right = space.scaled_factors()
        scales = (product_row_norms(left.detach(), right.detach()) + self.max_scale**-2) ** -0.5
        product = linear(linear(x.detach(), right.to(x.dtype)), left.to(x.dtype))
        return (product - product.detach()) * (scales - 1).to(product.dtype)
