"""Floor 3: tuners, one package each; importing this package registers all of them with peft."""

from .adapter_layer import AdapterLayer, adapter_layers
from .kernel_lora import BudgetCompetitionConfig, KernelLoraConfig, KernelLoraLayer, KernelLoraModel
from .sparse_lora import (
    FactorMaskConfig,
    HalfRoundsConfig,
    LayerSamplingConfig,
    PruningConfig,
    RankAllocationConfig,
    RegrowthConfig,
    SparseLoraConfig,
    SparseLoraLayer,
    SparseLoraModel,
    StructureConfig,
)

__all__ = [
    "AdapterLayer",
    "BudgetCompetitionConfig",
    "FactorMaskConfig",
    "HalfRoundsConfig",
    "KernelLoraConfig",
    "KernelLoraLayer",
    "KernelLoraModel",
    "LayerSamplingConfig",
    "PruningConfig",
    "RankAllocationConfig",
    "RegrowthConfig",
    "SparseLoraConfig",
    "SparseLoraLayer",
    "SparseLoraModel",
    "StructureConfig",
    "adapter_layers",
]
