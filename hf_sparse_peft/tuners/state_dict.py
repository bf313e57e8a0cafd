"""What the tuners share in writing and reading adapter files: missing tensors, and state that only training needs."""

from __future__ import annotations

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .adapter_layer import AdapterLayer


def check_complete(state_dict: dict[str, torch.Tensor], model: nn.Module, adapter_name: str) -> None:
    """Refuse to save an adapter from a state dict that does not have all of it.

    Raises:
        ValueError: a tensor of the adapter's layers or heads is not in `state_dict`, or the adapter has none at all.
    """
    expected = []
    for name, module in model.named_modules():
        name = name.removeprefix("_fsdp_wrapped_module.")  # as peft does; the state dict of FSDP has no such names
        if isinstance(module, AdapterLayer):
            kinds = [kind for kind in _kinds(module) if adapter_name in getattr(module, kind)]
            expected += [f"{name}.{kind}.{adapter_name}".removeprefix(".") for kind in kinds]
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            inside = f"{name}.modules_to_save.{adapter_name}."
            expected += [inside + key for key in module.modules_to_save[adapter_name].state_dict()]
    missing = [key for key in expected if key not in state_dict]
    if missing:
        raise ValueError(
            f"The state dict to save adapter '{adapter_name}' from lacks {len(missing)} of its {len(expected)} "
            f"tensors, '{missing[0]}' first; it has {sorted(state_dict)[:2]}. Pass the state dict of the whole model, "
            "buffers included, or none (DeepSpeed ZeRO-3: stage3_gather_16bit_weights_on_model_save=true)."
        )
    if not expected:
        raise ValueError(f"Adapter '{adapter_name}' has no tensor in any layer; there is nothing to save.")


def _kinds(layer: AdapterLayer) -> list[str]:
    names = (*layer.adapter_layer_names, *layer.other_param_names)
    return [
        name
        for name in names
        if isinstance(held := getattr(layer, name), nn.ParameterDict)
        or (isinstance(held, BufferDict) and held.persistent)
    ]


def present(state_dict: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """The tensor of that key.

    Raises:
        ValueError: the file has none.
    """
    if key not in state_dict:
        raise ValueError(
            f"'{key}' is missing from the adapter file; it is incomplete, or its config targets other modules now."
        )
    return state_dict[key]


def settle_training_state(
    state_dict: dict[str, torch.Tensor], prefix: str, layer: AdapterLayer, adapter_name: str
) -> None:
    """Fit the file's training state to the layer's: a run that goes on gets its own, nobody else does."""
    trained = any(
        adapter_name in held and held[adapter_name].requires_grad
        for held in (getattr(layer, kind) for kind in layer.adapter_layer_names)
    )
    for kind in layer.training_state_names:
        key, held = f"{prefix}{kind}.{adapter_name}", getattr(layer, kind)
        # The file's own names for a buffer that the layer does not have (any more), which upstream cannot map.
        for unmapped in (f"{prefix}{kind}", f"base_model.model.{prefix}{kind}"):
            if unmapped in state_dict:
                state_dict[key] = state_dict.pop(unmapped)
        if adapter_name not in held and trained and key in state_dict:
            layer.allocate_training_state(adapter_name)  # a finished run freed it, and goes on from a checkpoint
        if adapter_name not in held:
            state_dict.pop(key, None)
        elif key not in state_dict:
            state_dict[key] = torch.zeros_like(held[adapter_name])
