"""Bytes of an optimizer's state, from the optimizer itself taking a step on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from ..optim import OptimizerSettings, OptimizerSpec
from ..training import optimizer_spec
from .meta_answers import MetaAnswers

_SETTINGS = OptimizerSettings(lr=1e-4)
DEFAULT = "adamw_torch_fused"
"""Trainer's own."""
_adafactor = partial(Adafactor, scale_parameter=False, relative_step=False, lr=1e-4)
_MADE: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": _adafactor,
}
BNB = {
    "adamw_8bit": (2, True),
    "adamw_bnb_8bit": (2, True),
    "paged_adamw_8bit": (2, True),
    "paged_adamw_32bit": (2, False),
    "lion_32bit": (1, False),
    "lion_8bit": (1, True),
    "paged_lion_32bit": (1, False),
    "paged_lion_8bit": (1, True),
    "rmsprop_bnb": (1, False),
    "rmsprop_bnb_8bit": (1, True),
    "rmsprop_bnb_32bit": (1, False),
}
"""bitsandbytes' optimizers, which have no step on meta: states of each, and whether in 8 bits."""
SMALLEST_8BIT, _BNB_BLOCK = 4096, 256
NAMES = sorted({*_MADE, *BNB})


def optimizer_of(model: nn.Module, optimizer: OptimizerSpec | str | None) -> tuple[str, int]:
    """Name of the optimizer of what trains in `model`, on the meta device, and the bytes of its state.

    Args:
        optimizer: as a Trainer's `optim`, or a part of a config; None: what the adapter's config asks for, else
            Trainer's own.

    Raises:
        ValueError: a name that is not known here.
        TypeError: neither a name nor a part.
    """
    if optimizer is None:
        optimizer = optimizer_spec(model) or DEFAULT
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if isinstance(optimizer, OptimizerSpec):
        return optimizer.part_type, _state_after_step(optimizer.build(model, _SETTINGS)) if trained else 0
    if not isinstance(optimizer, str):
        raise TypeError(f"optimizer={optimizer!r}: pass a Trainer's optim, such as 'adamw_8bit', or AgedAdamWSpec().")
    name = str(getattr(optimizer, "value", optimizer))
    if name in BNB:
        return name, sum(_bnb_bytes(parameter.numel(), *BNB[name]) for parameter in trained)
    if name not in _MADE:
        raise ValueError(
            f"optimizer={name!r} has a state of unknown size; choose one of {NAMES}, or a part of a config."
        )
    return name, _state_after_step(_MADE[name](trained)) if trained else 0


def _state_after_step(optimizer: torch.optim.Optimizer) -> int:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        if not type(optimizer).__name__.startswith("ZerothOrder"):  # no state but a seed
            with MetaAnswers():
                optimizer.step()
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
    return sum(_bytes_in(state) for state in optimizer.state.values())


def _bytes_in(value: Any) -> int:
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    if isinstance(value, (dict, list, tuple)):
        return sum(map(_bytes_in, value.values() if isinstance(value, dict) else value))
    return 0


def _bnb_bytes(numel: int, states: int, eight_bits: bool) -> int:
    if not eight_bits or numel < SMALLEST_8BIT:
        return 4 * states * numel
    return states * (numel + 4 * math.ceil(numel / _BNB_BLOCK))
