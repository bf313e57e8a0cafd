"""Heads: the copies of whole modules (`modules_to_save`) that adapters train and keep, one for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from peft import PeftConfig, TaskType
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

# What peft's models for these tasks add to modules_to_save of the config they were given, after the injection.
_TASK_HEADS = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}


def name_task_heads(config: PeftConfig) -> None:
    """Name the head of the task in `config.modules_to_save`: the model's own config is saved, not the one given."""
    heads = _TASK_HEADS.get(config.task_type, ())
    held = list(config.modules_to_save or ())
    config.modules_to_save = held + [name for name in heads if name not in held] or None


def head_owners(model: nn.Module, adapter_names: Iterable[str], preferred: str | None = None) -> dict[str, str]:
    """Which adapter's copy of each module stands for all of `adapter_names`, by module name; modules of which none of
    them has a copy are left out.

    A copy is a whole module, not an update of one: copies cannot be added. Where several adapters have one, they must
    be equal, or `preferred` says whose is taken.

    Raises:
        ValueError: two adapters have different copies of a module, or one trains a part of a module (trained tokens).
    """
    names = list(dict.fromkeys(adapter_names))
    if preferred is not None and preferred not in names:
        raise ValueError(f"modules_to_save_from={preferred!r} is none of the adapters {names}.")
    owners = {}
    for name, module in model.named_modules():
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        holders = [n for n in names if n in module._get_available_adapters()]
        if holders and not isinstance(module, ModulesToSaveWrapper):
            raise ValueError(
                f"Adapter '{holders[0]}' trains parts of '{name}' ({type(module).__name__}), unknown here."
            )
        if preferred in holders:
            holders = [preferred]
        for other in holders[1:]:
            if not _equal(module.modules_to_save[holders[0]], module.modules_to_save[other]):
                raise ValueError(
                    f"Adapters '{holders[0]}' and '{other}' have different copies of '{name}' (modules_to_save), and "
                    "whole modules cannot be added up. Say whose is taken with modules_to_save_from= where that is "
                    "offered, or leave one of the adapters out."
                )
        if holders:
            owners[name] = holders[0]
    return owners


def assign_heads(model: nn.Module, owners: dict[str, str], adapter_name: str) -> None:
    """Give the adapter `adapter_name` the copies that `owners` names, in place of its own."""
    for name, owner in owners.items():
        wrapper = model.get_submodule(name)
        trains = [p.requires_grad for p in wrapper.modules_to_save[adapter_name].parameters()]
        head = copy.deepcopy(wrapper.modules_to_save[owner])
        for parameter, flag in zip(head.parameters(), trains, strict=True):
            parameter.requires_grad_(flag)
        wrapper.modules_to_save[adapter_name] = head


def use_heads(model: nn.Module, owners: dict[str, str]) -> None:
    """Make the copies that `owners` names the active ones, and no other."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([owners[name]] if name in owners else [], inference_mode=True)


def drop_heads(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter's copies, and let the modules themselves act where one was active."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            if adapter_name in module.active_adapters:
                module.set_adapter([])
            module._adapters.discard(adapter_name)
            del module.modules_to_save[adapter_name]


def check_active_heads(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Refuse to merge adapters under the heads of others.

    Raises:
        ValueError: a module's active copy is another adapter's than that of `adapter_names`.
    """
    for name, owner in head_owners(model, adapter_names).items():
        wrapper = model.get_submodule(name)
        active = [n for n in wrapper.active_adapters if n in wrapper.modules_to_save]
        if active and _equal(wrapper.modules_to_save[active[0]], wrapper.modules_to_save[owner]):
            continue
        raise ValueError(
            f"Adapter '{owner}' has its own copy of '{name}' (modules_to_save), and the active one is that of "
            f"{active[0] if active else 'the base model'}. Call set_adapter('{owner}') before merging it."
        )


def check_no_biases(configs: dict[str, object], adapter_names: Iterable[str], what: str) -> None:
    """Refuse what would lose or keep trained biases against the user's will.

    Raises:
        ValueError: one of the adapters trains biases, which are the base model's own parameters.
    """
    for name in adapter_names:
        bias = getattr(configs[name], "bias", "none")
        if bias != "none":
            raise ValueError(
                f"Adapter '{name}' has bias='{bias}': it trained biases of the base model itself, and {what}. "
                "hub.merge_to_dense and save_pretrained take them along."
            )


def _equal(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(
        a.dtype == b.dtype and torch.equal(a, b.to(a.device)) for a, b in ((one[k], two[k]) for k in one)
    )
