"""Floor 3: tuners, one package each; importing this package registers all of them with peft."""

from .adapter_layer import AdapterLayer, adapter_layers
from .sparse_lora import (
    PruningConfig,
    RankAllocationConfig,
    RegrowthConfig,
    SparseLoraConfig,
    SparseLoraLayer,
    SparseLoraModel,
)

__all__ = [
    "AdapterLayer",
    "PruningConfig",
    "RankAllocationConfig",
    "RegrowthConfig",
    "SparseLoraConfig",
    "SparseLoraLayer",
    "SparseLoraModel",
    "adapter_layers",
]
