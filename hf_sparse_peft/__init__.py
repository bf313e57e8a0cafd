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
from .tuners import PruningConfig, RankAllocationConfig, RegrowthConfig, SparseLoraConfig, SparseLoraModel

register_cards()

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
    "methods",
]
