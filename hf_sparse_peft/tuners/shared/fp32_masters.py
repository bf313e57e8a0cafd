"""Adapter values stay fp32 masters, whatever casts them between injection and training.

trl casts every trained parameter to bf16 where the base is 4-bit; `model.to(torch.bfloat16)` and `model.half()` cast
all that floats. An update smaller than 1/256 of a bf16 value is rounded away: parameters stop moving at small learning
rates. So `train()` and the first training forward bring fp32 back, in the same `Parameter` object, which an optimizer
may hold already. Heads (`modules_to_save`) that were cast apart from their originals follow, from the rounded values
where they had been trained. An adapter that was added with `autocast_adapter_dtype=False` keeps whatever dtype it is
given.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from .copies import note_parameters
from .idle_layers import model_of
from .tensors import AdapterTensors

_NARROW = (torch.bfloat16, torch.float16)

# A second reference to the storage of each parameter, by layer: `p.data = p.data.to(torch.bfloat16)` drops the first
# one only, and the values come back bit for bit. It costs no memory until somebody casts. Kept outside the layers, so
# that neither copies nor files of a model contain it.
_MASTERS: WeakKeyDictionary[AdapterTensors, dict[tuple[str, str], torch.Tensor]] = WeakKeyDictionary()

# Parameters brought back, with the dtype they had, until an optimizer that holds them steps.
_RESTORED = WeakIdKeyDictionary()
_step_hook: Any = None
_ddp_hook: Any = None


def _trained(layer: AdapterTensors) -> Iterable[tuple[str, str, nn.Parameter]]:
    """Kind, adapter and parameter of whatever may train in this layer and is not free to have any dtype."""
    for kind in layer.adapter_layer_names:
        for name, parameter in getattr(layer, kind).items():
            if name not in layer.any_dtype and not parameter.is_meta and not layer.adapter_configs[name].inference_mode:
                yield kind, name, parameter


def remember_masters(layer: AdapterTensors) -> None:
    """Refer to the storage of this layer's fp32 parameters once more, so that a cast does not free it."""
    known = _MASTERS.setdefault(layer, {})
    held = {}
    for kind, name, parameter in _trained(layer):
        if parameter.dtype == torch.float32:
            held[kind, name] = parameter.data
        elif (kind, name) in known and parameter.dtype in _NARROW:
            held[kind, name] = known[kind, name]
    _MASTERS[layer] = held


@torch.no_grad()
def restore_masters(layer: AdapterTensors, wrapped: bool = True) -> None:
    """Give parameters and floating-point state of this layer that were cast to bf16 or fp16 back their fp32.

    Values come back bit for bit where nothing but the cast has happened to them, else as the cast rounded them. Says
    once for an adapter which of both it was. `wrapped`: DistributedDataParallel may have taken the model over.
    """
    cast = [found for found in _trained(layer) if found[2].dtype in _NARROW]
    if cast and wrapped and _in_several_processes():
        for _, name, parameter in cast:
            _tell(layer, name, parameter.dtype, "distributed")
        return
    for kind, name, parameter in cast:
        narrow = parameter.dtype
        exact = _set_fp32(parameter, _MASTERS.get(layer, {}).get((kind, name)))
        _watch_optimizers(parameter, narrow)
        _tell(layer, name, narrow, "exact" if exact else "rounded")
    if not cast:
        return
    for kind in layer.other_param_names:
        held = getattr(layer, kind)
        for name, buffer in held.items() if isinstance(held, BufferDict) else ():
            if buffer.dtype in _NARROW and name not in layer.any_dtype:
                buffer.data = buffer.data.float()
    note_parameters(layer, [name for _, name, _ in cast if name not in layer.active_adapters])
    remember_masters(layer)
    _restore_heads(layer, {name for _, name, _ in cast})


def _restore_heads(layer: AdapterTensors, names: set[str]) -> None:
    """Undo the same cast for the adapters' copies of whole modules (`modules_to_save`), where it spared the originals:
    these say which dtype the copies had. After `model.half()` copy and original agree, and both stay."""
    model = model_of(layer)
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)] if model is not None else []
    for wrapper in wrappers:
        originals = dict(wrapper.original_module.named_parameters())
        for name in names & set(wrapper.modules_to_save.keys()):
            for key, parameter in wrapper.modules_to_save[name].named_parameters():
                narrow, original = parameter.dtype, originals.get(key)
                if narrow not in _NARROW or original is None or original.dtype != torch.float32:
                    continue
                exact = _set_fp32(parameter, original.data.clone())  # an untrained copy is the original's
                _watch_optimizers(parameter, narrow)
                _tell(layer, name, narrow, "exact" if exact else "rounded")


def _set_fp32(parameter: nn.Parameter, master: torch.Tensor | None) -> bool:
    """Make `parameter` fp32 in place; whether its values from before the cast were still there."""
    values, gradient = parameter.data, parameter.grad
    exact = master is not None and master.shape == values.shape
    exact = exact and torch.equal(master.to(values.device, values.dtype), values)
    parameter.grad = None
    parameter.data = master.to(values.device) if exact else values.float()
    if gradient is not None:
        parameter.grad = gradient.float()
    return exact


def _in_several_processes() -> bool:
    # DistributedDataParallel has laid out its gradient buckets by dtype when the first forward comes.
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def restore_before_ddp() -> None:
    """From now on, undo casts when DistributedDataParallel takes a model over, before it lays out its buckets."""
    global _ddp_hook
    if _ddp_hook is None:
        _ddp_hook = register_module_module_registration_hook(_before_ddp)


def _before_ddp(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(parent, nn.parallel.DistributedDataParallel) and child is not None:
        for module in child.modules():
            if hasattr(module, "any_dtype"):
                restore_masters(module, wrapped=False)


def _watch_optimizers(parameter: nn.Parameter, narrow: torch.dtype) -> None:
    global _step_hook
    _RESTORED[parameter] = narrow
    if _step_hook is None:
        _step_hook = register_optimizer_step_pre_hook(_widen_state)


def _widen_state(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Before a step: moments that `load_state_dict` or a step cast along with a parameter follow it back to fp32."""
    global _step_hook
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in _RESTORED:
                continue
            narrow, state = _RESTORED.pop(parameter), optimizer.state.get(parameter, {})
            for key, tensor in state.items():
                if isinstance(tensor, torch.Tensor) and tensor.dtype == narrow and tensor.shape == parameter.shape:
                    state[key] = tensor.float()
    if not len(_RESTORED) and _step_hook is not None:
        _step_hook.remove()
        _step_hook = None


def _tell(layer: AdapterTensors, adapter_name: str, narrow: torch.dtype, outcome: str) -> None:
    config = layer.adapter_configs[adapter_name]
    told = config.__dict__.setdefault("_casts_told", set())  # every layer of the adapter shares the config
    if outcome in told:
        return
    told.add(outcome)
    what = {
        "exact": "They are fp32 again, bit for bit as before the cast.",
        "rounded": "They are fp32 again, and start from what the cast rounded them to.",
        "distributed": "Several processes train, and it is too late to change that: cast before the model is wrapped.",
    }[outcome]
    warnings.warn(
        f"The values of adapter '{adapter_name}' were cast to {narrow} after it was added (trl does so on 4-bit "
        f"bases), where small updates are rounded away. {what} For {narrow} values, add the adapter with "
        "autocast_adapter_dtype=False.",
        stacklevel=2,
    )
