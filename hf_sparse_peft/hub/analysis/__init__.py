"""What checkpoints and adapters tell after training: changed entries, supports made of them, overlap of masks."""

from .mask_overlap import MaskOverlap, measure_mask_overlap
from .subnetwork import UpdateSparsity, measure_update_sparsity, support_from_checkpoints

__all__ = [
    "MaskOverlap",
    "UpdateSparsity",
    "measure_mask_overlap",
    "measure_update_sparsity",
    "support_from_checkpoints",
]
