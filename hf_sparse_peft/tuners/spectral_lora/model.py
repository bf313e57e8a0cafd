"""`SpectralLoraModel`: injects and checks spectral adapters."""

from __future__ import annotations

from torch import nn

from ..shared.model import AdapterModel
from .layer import SpectralLoraLayer, SpectralLoraLinear


class SpectralLoraModel(AdapterModel):
    r"""Spectral adapters, :math:`\Delta W = s\,B\,C\,A`, on dense and quantised linears.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = SpectralLoraLayer
    linear_cls = SpectralLoraLinear


def spectral_layers(model: nn.Module) -> list[SpectralLoraLayer]:
    """All layers of `model` with a spectral adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, SpectralLoraLayer)]
