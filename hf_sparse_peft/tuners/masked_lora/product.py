r"""The product of activations with a masked weight, which is built in each pass and kept in none.

:math:`Y = X (M \odot (W + D))^\top`, for bases that hold weights where the mask has none; or what comes beside the
base layer's own output: :math:`X (M \odot D)^\top` where the base is 0 off the mask, else
:math:`X (M \odot (W + D) - W)^\top`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...ops import autocast_off
from .masking import Masking
from .updates import MaskedUpdate
from .weight import MaskedWeight, masked


@dataclass(frozen=True)
class ProductPlan:
    """One masked product, beside its tensors."""

    names: tuple[str, ...]
    """Names of the tensors that follow, without the tuner's prefix."""
    weight: Callable[[dict[str, Tensor]], MaskedWeight]
    """The weight of those tensors."""
    update: MaskedUpdate
    masking: Masking
    dtype: torch.dtype
    """Dtype of the products."""
    gives: Literal["whole", "masked_delta", "change"]
    """Which weight X meets: :math:`M \\odot V`, :math:`M \\odot D`, or :math:`M \\odot V - W`."""
    removed_before: tuple[Callable[[], Tensor], ...] = ()
    """Masks of other adapters that have changed W already, for `change`."""
    reader: Callable[[Tensor], None] | None = None
    """Shown the dense gradient G `[out, in]` in every backward pass."""
    passive_reader: Callable[[Tensor], None] | None = None
    """Likewise, for diagnostics."""

    def matrix(self, of: MaskedWeight, mask: Tensor) -> Tensor | None:
        """The weight `[out, in]` that X meets under `mask`; None: 0."""
        if self.gives == "masked_delta":
            return None if of.delta is None else masked(of.delta, mask)
        if self.gives == "whole":
            return masked(of.dense, mask)
        change = masked(of.base, mask) - of.base
        for other in self.removed_before:
            change = masked(change, other())
        return change if of.delta is None else change + masked(of.delta, mask)


@torch.compiler.disable
def masked_product(x: Tensor, plan: ProductPlan, tensors: dict[str, Tensor]) -> Tensor:
    """`x` `[..., in]` times the plan's weight, `[..., out]` in its dtype.

    Kept for the backward pass: `x` in its own dtype and the tensors themselves, bits and factors; what has the weight's
    shape is built anew there and lives for one layer at a time.
    """
    return _MaskedProduct.apply(x, plan, *tensors.values())


class _MaskedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: ProductPlan, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.plan = plan
        with autocast_off(x.device.type):
            of = plan.weight(dict(zip(plan.names, tensors, strict=True)))
            weight = plan.matrix(of, plan.masking.mask(of))
            if weight is None:
                return x.new_zeros(*x.shape[:-1], of.shape[0], dtype=plan.dtype)
            return x.to(plan.dtype) @ weight.to(plan.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        plan, needed = ctx.plan, ctx.needs_input_grad
        with autocast_off(x.device.type):
            gradient = gradient.to(plan.dtype)
            of = plan.weight(dict(zip(plan.names, tensors, strict=True)))
            mask = plan.masking.mask(of)
            dx, found = None, {}
            if needed[0]:
                weight = plan.matrix(of, plan.masking.input_mask(of, mask))
                dx = torch.zeros_like(x) if weight is None else (gradient @ weight.to(plan.dtype)).to(x.dtype)
                del weight
            if any(needed[2:]) or plan.reader is not None or plan.passive_reader is not None:
                flat, dy = x.reshape(-1, x.shape[-1]).to(plan.dtype), gradient.reshape(-1, gradient.shape[-1])
                G = dy.t() @ flat
                for reader in (plan.reader, plan.passive_reader):
                    if reader is not None:
                        reader(G)
                if any(needed[2:]):
                    G = G.to(of.dtype)
                    found = plan.masking.gradients(of, G, mask)
                    found |= plan.update.gradients(of, plan.masking.weight_gradient(of, G, mask))
        own = (found.get(name) if needs else None for name, needs in zip(plan.names, needed[2:], strict=True))
        return dx, None, *own
