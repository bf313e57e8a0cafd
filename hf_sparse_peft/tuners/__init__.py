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
    UpdateSparsity,
    initialize_support,
    load_support,
    measure_update_sparsity,
    save_support,
    support_from_checkpoints,
    write_supports,
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
    "UpdateSparsity",
    "adapter_layers",
    "initialize_support",
    "load_support",
    "measure_update_sparsity",
    "save_support",
    "support_from_checkpoints",
    "write_supports",
]
