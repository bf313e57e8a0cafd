"""`KernelLoraModel`: injects and checks kernel adapters."""

from __future__ import annotations

from ..shared.model import AdapterModel
from .layer import KernelLoraLayer, KernelLoraLinear


class KernelLoraModel(AdapterModel):
    r"""Kernel adapters, :math:`\Delta W = \mathrm{compete}(K(P, Q))`, on dense and quantised linears (Shen et al., 2024
    and 2025).

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = KernelLoraLayer
    linear_cls = KernelLoraLinear
