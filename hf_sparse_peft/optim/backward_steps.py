"""Updates in the backward pass: a parameter steps when its gradient is complete, and the gradient is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_HOOKS = WeakIdKeyDictionary()
"""Parameter -> the hook that updates it; one at a time, also over several optimizers."""


def step_in_backward(optimizer: Any) -> Callable[[], None]:
    """Let `optimizer.update_now(p)` run for every parameter as soon as the backward pass has its gradient, which is
    freed then: at most one gradient is alive at a time.

    Every backward pass is a step, so that gradients cannot be accumulated, clipped, scaled (fp16) or reduced over ranks
    (DDP) before it. An optimizer of the same parameters that did so before stops.

    Returns: a function that ends it.

    Raises:
        ValueError: in the backward pass, where several processes train together.
    """
    reference = weakref.ref(optimizer)
    own = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if (before := _HOOKS.get(p)) is not None:
                before.remove()
            _HOOKS[p] = p.register_post_accumulate_grad_hook(partial(_update, reference))
            own.append((p, _HOOKS[p]))
    optimizer.steps_in_backward = True

    def end() -> None:
        optimizer.steps_in_backward = False
        for p, hook in own:
            hook.remove()
            if _HOOKS.get(p) is hook:
                del _HOOKS[p]

    return end


def _update(reference: weakref.ref, p: Tensor) -> None:
    optimizer = reference()
    if optimizer is None or p.grad is None:  # the optimizer is gone: gradients stay for whoever comes next
        return
    if several_ranks():
        raise ValueError(
            "Updates in the backward pass see the gradient of one rank before it is averaged. Leave layerwise=True out "
            "under DDP."
        )
    optimizer.update_now(p)
    p.grad = None


def several_ranks() -> bool:
    """Whether several processes train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1
