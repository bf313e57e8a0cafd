"""What a rule adds to the output of a layer in training passes, and norms of the rows of a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .space import UnitSpace


@contextmanager
def added_to_output(space: UnitSpace, term: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, training passes of the layer of `space` give `term(x)` `[..., out]` more, where the adapter is active."""

    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not layer.training or layer.disable_adapters or layer.merged or space.adapter not in layer.active_adapters:
            return None
        return output + term(args[0]).to(output.dtype)

    handle = space.layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def product_row_norms(left: Tensor, right: Tensor) -> Tensor:
    r""":math:`\|(L R)_i\|_2` `[m]` fp32 of `L` `[m, k]` and `R` `[k, n]`, in :math:`O(k^2 (m + n))`."""
    left, right = left.float(), right.float()
    return ((left @ (right @ right.t())) * left).sum(1).clamp_min(0).sqrt()
