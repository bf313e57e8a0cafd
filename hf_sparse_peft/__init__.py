"""Sparse and sparse + low-rank fine-tuning for peft and the Hugging Face Trainer. Importing registers every tuner."""

from .callbacks import (
    MaskRegrowthCallback,
    PruningCallback,
    RankReallocationCallback,
    SupportTelemetryCallback,
    callbacks_for,
)
from .tuners import PruningConfig, RankAllocationConfig, RegrowthConfig, SparseLoraConfig, SparseLoraModel

__version__ = "0.1.0"

__all__ = [
    "MaskRegrowthCallback",
    "PruningCallback",
    "PruningConfig",
    "RankAllocationConfig",
    "RankReallocationCallback",
    "RegrowthConfig",
    "SparseLoraConfig",
    "SparseLoraModel",
    "SupportTelemetryCallback",
    "__version__",
    "callbacks_for",
]
