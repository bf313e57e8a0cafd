"""Sparse and sparse + low-rank fine-tuning for peft and the Hugging Face Trainer. Importing registers every tuner."""

from .tuners import PruningConfig, RankAllocationConfig, RegrowthConfig, SparseLoraConfig, SparseLoraModel

__version__ = "0.1.0"

__all__ = [
    "PruningConfig",
    "RankAllocationConfig",
    "RegrowthConfig",
    "SparseLoraConfig",
    "SparseLoraModel",
    "__version__",
]
