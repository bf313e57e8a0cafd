"""`KernelLoraModel`: injects and checks kernel adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapter_model import AdapterModel
from ..state_dict import present, settle_training_state
from .config import KernelLoraConfig
from .layer import KernelLoraLayer, KernelLoraLinear


class KernelLoraModel(AdapterModel):
    r"""Kernel adapters, :math:`\Delta W = \mathrm{compete}(K(P, Q))`, on dense and quantised linears (Shen et al., 2024
    and 2025).

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    prefix: str = "kernel_lora_"
    tuner_layer_cls = KernelLoraLayer
    linear_cls = KernelLoraLinear

    def layer_options(self, peft_config: KernelLoraConfig, module_name: str) -> dict[str, Any]:
        """What `update_layer` takes for that module."""
        return {"config": peft_config, "inference_mode": peft_config.inference_mode}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        remapped = dict(super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict))
        for name, layer in model.named_modules():
            if isinstance(layer, KernelLoraLayer):
                prefix = f"{name}." if name else ""
                _check_layer(remapped, prefix, layer, adapter_name)
                settle_training_state(remapped, prefix, layer, adapter_name)
        return remapped

    def compact(self, adapter_name: str | None = None) -> None:
        """Free what only training needs and note in the config that it is over. Parameters keep their shapes."""
        for name in [adapter_name] if adapter_name else self.active_adapters:
            for layer in self.adapted_layers():
                layer.drop_training_state(name)
            self.peft_config[name].training_finished = True


def kernel_layers(model: nn.Module) -> list[KernelLoraLayer]:
    """All layers of `model` with a kernel adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, KernelLoraLayer)]


def _check_layer(state_dict: dict[str, Any], prefix: str, layer: KernelLoraLayer, adapter_name: str) -> None:
    for kind in (*layer.adapter_layer_names, "kernel_lora_survivors"):
        held = getattr(layer, kind)
        if adapter_name not in held:
            continue
        key = f"{prefix}{kind}.{adapter_name}"
        tensor, expected = present(state_dict, key), held[adapter_name]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"'{key}' in the adapter file has shape {tuple(tensor.shape)}, and its config on this base makes it "
                f"{tuple(expected.shape)}. The file is truncated or belongs to another base model or config."
            )
        if kind == "kernel_lora_survivors":
            if tensor.is_floating_point() or not 0 <= int(tensor) <= layer.numel:
                raise ValueError(
                    f"'{key}' in the adapter file is {tensor.tolist()}, no count of the {layer.numel} entries of this "
                    "weight. The file is damaged or belongs to another base model."
                )
        elif not torch.isfinite(tensor).all():
            raise ValueError(f"'{key}' in the adapter file has values that are not finite; the adapter is damaged.")
        # A copy, because with low_cpu_mem_usage the layer would keep the mapped file itself.
        state_dict[key] = tensor.to(expected.dtype, copy=True)
