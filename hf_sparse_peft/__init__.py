"""Sparse and sparse + low-rank fine-tuning for peft and the Hugging Face Trainer. Importing registers every tuner."""

from . import methods
from .callbacks import (
    BudgetCompetitionCallback,
    MaskRegrowthCallback,
    PruningCallback,
    RankReallocationCallback,
    SupportTelemetryCallback,
    callbacks_for,
)
from .hub import register_cards
from .tuners import (
    BudgetCompetitionConfig,
    FactorMaskConfig,
    HalfRoundsConfig,
    KernelLoraConfig,
    KernelLoraModel,
    LayerSamplingConfig,
    PruningConfig,
    RankAllocationConfig,
    RegrowthConfig,
    SparseLoraConfig,
    SparseLoraModel,
    StructureConfig,
)

register_cards()

__version__ = "0.1.0"

__all__ = [
    "BudgetCompetitionCallback",
    "BudgetCompetitionConfig",
    "FactorMaskConfig",
    "HalfRoundsConfig",
    "KernelLoraConfig",
    "KernelLoraModel",
    "LayerSamplingConfig",
    "MaskRegrowthCallback",
    "PruningCallback",
    "PruningConfig",
    "RankAllocationConfig",
    "RankReallocationCallback",
    "RegrowthConfig",
    "SparseLoraConfig",
    "SparseLoraModel",
    "StructureConfig",
    "SupportTelemetryCallback",
    "__version__",
    "callbacks_for",
    "methods",
]
