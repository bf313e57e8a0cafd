"""Masked LoRA: a low-rank update that leaves the zeros of a pruned base zero (PERP's MaskLoRA)."""

from ..shared.registration import register_tuner
from .config import MaskedLoraConfig
from .layer import MaskedLoraLayer, MaskedLoraLinear
from .masks import set_masks
from .model import MaskedLoraModel

register_tuner(MaskedLoraConfig, MaskedLoraModel)

__all__ = [
    "MaskedLoraConfig",
    "MaskedLoraLayer",
    "MaskedLoraLinear",
    "MaskedLoraModel",
    "set_masks",
]
