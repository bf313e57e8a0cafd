"""Sparse and sparse + low-rank fine-tuning for peft and the Hugging Face Trainer. Importing registers every tuner."""

from . import methods
from .callbacks import (
    MaskRegrowthCallback,
    PruningCallback,
    RankReallocationCallback,
    SupportTelemetryCallback,
    callbacks_for,
)
from .hub import register_cards
from .tuners import (
    FactorMaskConfig,
    HalfRoundsConfig,
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
    "FactorMaskConfig",
    "HalfRoundsConfig",
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
