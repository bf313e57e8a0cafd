"""`GradientNoise`: noise on the weights of a training pass, larger where rows and their gradients are (LoRA-GGPO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..sparsity import stream_seed
from ..utils.option_types import NonNegativeFloat
from ..utils.parts import register_part
from ..utils.tensors import TensorSpec
from .collectives import rank
from .forward_terms import added_to_output, product_row_norms
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("gradient_noise")
@dataclass(frozen=True)
class GradientNoise(Rule):
    r"""Every training pass has the weight :math:`W + E`, :math:`E_{ij} \sim N(0, (\sigma w_i + \beta g_i^2)^2 / m)` of
    `m` rows (LoRA-GGPO, version 1; Chang et al., 2025), with :math:`w_i^2 = \bar n^2 + \|\Delta W_i\|^2`, the mean row
    norm :math:`\bar n` of the base weight, and :math:`g_i = \|(s B\,\partial A + s\,\partial B A)_i\|` of the gradients
    of the step before, clipped; no noise before there are any. `E` is drawn for a micro-batch, on each rank its own,
    and drawn again in the backward pass: none of it is kept. Gradients are those at the perturbed weight.

    As in kohya-ss/sd-scripts, whose constants these are; the authors' code was not available, the paper's constants are
    unconfirmed. sd-scripts takes :math:`\bar n` from 1000 rows, and leaves `s` out of :math:`\Delta W`.
    """

    sigma: NonNegativeFloat = 0.03
    r""":math:`\sigma`."""
    beta: NonNegativeFloat = 0.01
    r""":math:`\beta`."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"forward"})
    needs: ClassVar[frozenset[str]] = frozenset({"scaling"})

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """fp32 `[out]`: g."""
        return [TensorSpec("row_gradient", (space.weight_shape[0],), role="rule")]

    def begin(self, run: Run) -> None:
        """Measure the base weights."""
        rows = {space: space.layer.dense_base_weight().float().norm(dim=1) for space in run.all_spaces}
        run.memory.norms = {space: float(norms.mean()) for space, norms in rows.items()}

    def before_step(self, run: Run) -> None:
        """Add the noise."""
        run.memory.micro_batch = 0
        noisy = [space for space in run.all_spaces if space.state()["row_gradient"].any()]
        run.for_this_step(added_to_output(space, self._term(run, space)) for space in noisy)

    def after_micro_batch(self, run: Run) -> None:
        """The next micro-batch has noise of its own."""
        run.memory.micro_batch += 1

    def deviations(self, run: Run, space: UnitSpace) -> Tensor:
        """fp32 `[out]`: standard deviations of the rows of `E` at this step."""
        left, right = space.scaled_factors()
        norms = (run.memory.norms[space] ** 2 + product_row_norms(left, right) ** 2).sqrt()
        return (self.sigma * norms + self.beta * space.state()["row_gradient"] ** 2) / norms.numel() ** 0.5

    def _term(self, run: Run, space: UnitSpace) -> Callable[[Tensor], Tensor]:
        deviations = self.deviations(run, space)[:, None].detach()

        def term(x: Tensor) -> Tensor:
            seed = stream_seed(run.seed, space.name, "noise", run.step, run.memory.micro_batch, rank())

            def draw() -> Tensor:
                generator = torch.Generator(x.device).manual_seed(seed)
                noise = torch.randn(space.weight_shape, generator=generator, device=x.device)
                return (noise * deviations).to(x.dtype)

            return _Product.apply(x, draw)

        return term

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Measure the gradients of the coming update."""
        for space in run.spaces():
            if space.A.grad is None or space.B.grad is None:
                continue
            left = torch.cat([space.scaled_columns(space.B), space.scaled_columns(space.B.grad)], 1)
            rows = product_row_norms(left, torch.cat([space.A.grad, space.A])) / run.gradient_scale
            if torch.isfinite(rows).all():
                space.state()["row_gradient"].copy_(rows)


class _Product(torch.autograd.Function):
    """:math:`x E^T` with an `E` that is drawn anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        ctx.draw = draw
        return x @ draw().t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.draw(), None
