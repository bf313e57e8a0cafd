"""Masked adapters: updates that leave the zeros of a pruned base zero (PERP's MaskLoRA), and masks that move."""

from ..shared.registration import register_tuner
from .config import MaskedLoraConfig
from .layer import MaskedLoraLayer
from .linear import MaskedLoraLinear
from .mask_at_merge import MaskAtMerge
from .masking import HardMask, Masking
from .masks import save_masks, set_masks
from .model import MaskedLoraModel
from .one_shot import MagnitudeMask, MaskStart, WandaMask
from .scaled_dense import ScaledDenseUpdate
from .scores import ScoredMask
from .spaces import MaskSpace
from .structured_scores import StructuredScores
from .updates import DenseUpdate, LowRankUpdate, MaskedUpdate, NoUpdate, ScaleUpdate
from .weight import MaskedWeight

register_tuner(MaskedLoraConfig, MaskedLoraModel)

__all__ = [
    "DenseUpdate",
    "HardMask",
    "LowRankUpdate",
    "MagnitudeMask",
    "MaskAtMerge",
    "MaskSpace",
    "MaskStart",
    "MaskedLoraConfig",
    "MaskedLoraLayer",
    "MaskedLoraLinear",
    "MaskedLoraModel",
    "MaskedUpdate",
    "MaskedWeight",
    "Masking",
    "NoUpdate",
    "ScaleUpdate",
    "ScaledDenseUpdate",
    "ScoredMask",
    "StructuredScores",
    "WandaMask",
    "save_masks",
    "set_masks",
]
