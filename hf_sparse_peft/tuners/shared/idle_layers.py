"""Adapted layers that never ran: models read weights of layers that they do not call, in fused kernels for instance.

An adapter there has neither effect nor gradient, and nothing fails. So the layers note that they ran in training mode,
and those that did not are named once: when the second training forward of the model begins, or after the first step of
an optimizer, whichever comes first.
"""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .best_model import warn_within_trainer
from .tensors import AdapterTensors

# Kept outside the layers: copies of a model must not point at the original.
_MODELS: WeakKeyDictionary[AdapterTensors, ref] = WeakKeyDictionary()
_watched: WeakSet[nn.Module] = WeakSet()
_step_hook: Any = None


def belongs_to(layer: AdapterTensors, model: nn.Module) -> None:
    """Note which model the layer was injected into."""
    _MODELS[layer] = ref(model)


def model_of(layer: AdapterTensors) -> nn.Module | None:
    """The model that `layer` was injected into, while it is there; None for a copied layer."""
    return _MODELS[layer]() if layer in _MODELS else None


def note_that_it_runs(layer: AdapterTensors, active: list[str]) -> None:
    """Note that `layer` runs in training mode; the first one of a model has its first optimizer step watched."""
    global _step_hook
    if layer.ran_in_training.issuperset(active):
        return
    layer.ran_in_training.update(active)
    model = model_of(layer)
    if model is not None:
        if model not in _watched:
            warn_within_trainer(model)
        _watched.add(model)
        if _step_hook is None:
            _step_hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    global _step_hook
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in list(_watched):
        if any(id(parameter) in stepped for parameter in model.parameters()):
            _watched.discard(model)
            name_idle_layers(model)
    if not _watched and _step_hook is not None:
        _step_hook.remove()
        _step_hook = None


def watch_forwards(model: nn.Module) -> None:
    """Have `model` name idle layers when its second training forward begins."""
    if _before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_forward)


def stop_watching(model: nn.Module) -> None:
    """Leave `model` as it was before `watch_forwards`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _before_forward:
            del model._forward_pre_hooks[key]


def _before_forward(model: nn.Module, args: tuple) -> None:
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and name_idle_layers(model):
        stop_watching(model)


def name_idle_layers(model: nn.Module) -> bool:
    """Warn, once for each adapter, of active layers that have not run in training; whether any has run."""
    layers = [module for module in model.modules() if hasattr(module, "ran_in_training")]
    if any(getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in model.modules()):
        return True  # compiled regions run without noting it
    begun = {name for layer in layers for name in layer.ran_in_training}
    for name in begun:
        active = [layer for layer in layers if name in layer.active_adapters and layer.holds(name)]
        idle = [layer.module_name for layer in active if name not in layer.ran_in_training]
        config = active[0].adapter_configs[name] if active else None
        if not idle or getattr(config, "_idle_told", False):
            continue
        config._idle_told = True
        shown = ", ".join(f"'{one}'" for one in idle[:4]) + (" and others" if len(idle) > 4 else "")
        warnings.warn(
            f"{len(idle)} of {len(active)} layers of adapter '{name}' did not run in the first training step: {shown}. "
            "Either the batch did not reach them (an expert without tokens, another tower), or the model reads their "
            "weight without calling them (a fused kernel): then the adapter has no effect and no gradient there, and "
            "exclude_modules should leave them out.",
            stacklevel=2,
        )
    return bool(begun)
