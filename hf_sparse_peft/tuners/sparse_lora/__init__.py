"""The flagship tuner: a support of entries, blocks, rows or columns, beside a low-rank half whose ranks can move."""

from ..shared.registration import register_tuner
from .config import SparseLoraConfig
from .factor_masks import FactorMaskConfig
from .gradient_projection import GradientProjection
from .gradient_split import GradientSplit
from .layer import SparseLoraLayer
from .linear import SparseLoraLinear
from .model import SparseLoraModel
from .starts import Start
from .structures import StructureConfig

register_tuner(SparseLoraConfig, SparseLoraModel)

__all__ = [
    "FactorMaskConfig",
    "GradientProjection",
    "GradientSplit",
    "SparseLoraConfig",
    "SparseLoraLayer",
    "SparseLoraLinear",
    "SparseLoraModel",
    "Start",
    "StructureConfig",
]
