"""Sparse and sparse + low-rank fine-tuning for peft and the Hugging Face Trainer. Importing registers every tuner."""

from . import methods
from .hub import register_cards, register_saving
from .hub.analysis import (
    MaskOverlap,
    UpdateSparsity,
    measure_mask_overlap,
    measure_update_sparsity,
    support_from_checkpoints,
)
from .rules import AlternateModules, Prune, Rule, SampleLayers
from .training import (
    BudgetCompetitionCallback,
    Controller,
    InitialSupportCallback,
    LayerSamplingCallback,
    MaskRegrowthCallback,
    PruningCallback,
    RankReallocationCallback,
    SplitFactorsCallback,
    SupportSearchCallback,
    SupportTelemetryCallback,
    callbacks_for,
    initialize_support,
    load_support,
    save_support,
    write_supports,
)
from .tuners import (
    BudgetCompetitionConfig,
    FactorMaskConfig,
    KernelLoraConfig,
    KernelLoraModel,
    RankAllocationConfig,
    RegrowthConfig,
    SparseLoraConfig,
    SparseLoraModel,
    StructureConfig,
    SupportSearchConfig,
    restore_fp32,
)

register_cards()
register_saving()

__version__ = "0.1.0"

__all__ = [
    "AlternateModules",
    "BudgetCompetitionCallback",
    "BudgetCompetitionConfig",
    "Controller",
    "FactorMaskConfig",
    "InitialSupportCallback",
    "KernelLoraConfig",
    "KernelLoraModel",
    "LayerSamplingCallback",
    "MaskOverlap",
    "MaskRegrowthCallback",
    "Prune",
    "PruningCallback",
    "RankAllocationConfig",
    "RankReallocationCallback",
    "RegrowthConfig",
    "Rule",
    "SampleLayers",
    "SparseLoraConfig",
    "SparseLoraModel",
    "SplitFactorsCallback",
    "StructureConfig",
    "SupportSearchCallback",
    "SupportSearchConfig",
    "SupportTelemetryCallback",
    "UpdateSparsity",
    "__version__",
    "callbacks_for",
    "initialize_support",
    "load_support",
    "measure_mask_overlap",
    "measure_update_sparsity",
    "methods",
    "restore_fp32",
    "save_support",
    "support_from_checkpoints",
    "write_supports",
]
