"""What a rule adds to the output of a layer, or to the loss, in training passes, and norms of the rows of a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.label_shift import at_labels, measured_shift, shift_by_class
from .space import UnitSpace

if TYPE_CHECKING:
    from .run import Run


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


def share_of_step(run: Run, output: Any, kwargs: dict[str, Any]) -> Any:
    """What of the step's loss this pass is, where losses are sums that are divided by the step's labels; 1 otherwise.
    `run.memory.shifted`, None before the first pass, keeps what it found of the labels."""
    labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if items is None or labels is None:
        return 1.0
    if run.memory.shifted is None and getattr(output, "logits", None) is not None:
        run.memory.shifted = measured_shift(output.logits, labels, output.loss, items)
    base = getattr(run.model, "get_base_model", lambda: run.model)()
    shifted = shift_by_class(base) if run.memory.shifted is None else run.memory.shifted
    return at_labels(torch.ones(labels.shape, device=labels.device), labels, shifted).numel() / items
