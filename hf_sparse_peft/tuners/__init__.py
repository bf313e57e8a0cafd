"""Floor 3: tuners, one package each; importing this package registers all of them with peft."""

from .sparse_lora import (
    PruningConfig,
    RankAllocationConfig,
    RegrowthConfig,
    SparseLoraConfig,
    SparseLoraLayer,
    SparseLoraModel,
)

__all__ = [
    "PruningConfig",
    "RankAllocationConfig",
    "RegrowthConfig",
    "SparseLoraConfig",
    "SparseLoraLayer",
    "SparseLoraModel",
]
