"""What checkpoints and adapters tell after training: changed entries, supports made of them, overlap of masks, the
difference of two adapters, intruder dimensions, utilized ranks."""

from .difference import AdapterDifference, ModuleDifference, adapter_difference
from .intruders import IntruderReport, intruder_dimensions
from .mask_overlap import MaskOverlap, measure_mask_overlap
from .subnetwork import UpdateSparsity, measure_update_sparsity, support_from_checkpoints
from .utilization import UtilizationReport, utilized_rank

__all__ = [
    "AdapterDifference",
    "IntruderReport",
    "MaskOverlap",
    "ModuleDifference",
    "UpdateSparsity",
    "UtilizationReport",
    "adapter_difference",
    "intruder_dimensions",
    "measure_mask_overlap",
    "measure_update_sparsity",
    "support_from_checkpoints",
    "utilized_rank",
]
