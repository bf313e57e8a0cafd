"""Parameters that a model has lost since an optimizer took them: sizes that data decides may leave nothing of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .optimizer_kinds import innermost

_REMOVED = WeakIdKeyDictionary()


def note_removed(parameter: nn.Parameter) -> None:
    """Its model no longer has it."""
    _REMOVED[parameter] = True


def note_kept(parameter: nn.Parameter) -> None:
    """Its model has it again."""
    _REMOVED.pop(parameter, None)


def forget_removed(optimizer: Any) -> bool:
    """Take noted parameters out of an optimizer, maybe wrapped, groups staying as many as they were: a resumed run,
    whose model never had them, finds an optimizer of the same parameters. Returns whether a group is empty now."""
    inner, emptied = innermost(optimizer), False
    for group in inner.param_groups:
        lost = [parameter for parameter in group["params"] if parameter in _REMOVED]
        for parameter in lost:
            inner.state.pop(parameter, None)
        group["params"][:] = [parameter for parameter in group["params"] if parameter not in _REMOVED]
        emptied = emptied or bool(lost and not group["params"])
    return emptied


def forgets_removed(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer`, which forgets such parameters before it gives or loads a state: one that was made before its run's
    checkpoint was loaded has more of them than the file."""
    optimizer.register_state_dict_pre_hook(_forget)
    optimizer.register_load_state_dict_pre_hook(_forget)
    return optimizer


def _forget(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    forget_removed(optimizer)
