"""Kernel adapters: an update of high rank from two small point sets, thinned by competition (SNELL, SNELLA)."""

from ..shared.registration import register_tuner
from .config import KernelLoraConfig
from .layer import KernelLoraLayer, KernelLoraLinear
from .model import KernelLoraModel

register_tuner(KernelLoraConfig, KernelLoraModel)

__all__ = [
    "KernelLoraConfig",
    "KernelLoraLayer",
    "KernelLoraLinear",
    "KernelLoraModel",
]
