"""`KernelLoraModel`: injects and checks kernel adapters."""

from __future__ import annotations

from torch import nn

from ..shared.model import AdapterModel
from .layer import KernelLoraLayer, KernelLoraLinear


class KernelLoraModel(AdapterModel):
    r"""Kernel adapters, :math:`\Delta W = \mathrm{compete}(K(P, Q))`, on dense and quantised linears (Shen et al., 2024
    and 2025).

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = KernelLoraLayer
    linear_cls = KernelLoraLinear


def kernel_layers(model: nn.Module) -> list[KernelLoraLayer]:
    """All layers of `model` with a kernel adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, KernelLoraLayer)]
