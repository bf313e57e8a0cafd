"""Structured adapters: Kronecker and other structures, maps of inputs and outputs, modules behind layers."""

from ..shared.registration import register_tuner
from .bottleneck import Bottleneck
from .config import StructuredConfig
from .displacement import Circulant, LowDisplacement, Toeplitz
from .experts import LowRankExperts, ScaleExperts
from .factor_pair import FactorPair
from .form import Additive, Behind, Beside, Call, Form, Mapped, Site
from .givens import Givens, QuasiGivens
from .hypernetwork import Hypernetwork
from .kronecker import Kronecker
from .layer import StructuredLayer, StructuredLinear
from .matrices import DenseMatrix, Matrix
from .matrix_product_experts import MatrixProductExperts
from .model import StructuredModel, structured_layers
from .phm import PHM
from .quantised import PackedMatrix, Quantised
from .reflections import Reflections
from .routing import Experts, ExpertSpace
from .scale_shift import ScaleShift
from .task_adapters import add_task_adapter
from .tensor_train import TensorTrain
from .tucker import Tucker

register_tuner(StructuredConfig, StructuredModel)

__all__ = [
    "PHM",
    "Additive",
    "Behind",
    "Beside",
    "Bottleneck",
    "Call",
    "Circulant",
    "DenseMatrix",
    "ExpertSpace",
    "Experts",
    "FactorPair",
    "Form",
    "Givens",
    "Hypernetwork",
    "Kronecker",
    "LowDisplacement",
    "LowRankExperts",
    "Mapped",
    "Matrix",
    "MatrixProductExperts",
    "PackedMatrix",
    "Quantised",
    "QuasiGivens",
    "Reflections",
    "ScaleExperts",
    "ScaleShift",
    "Site",
    "StructuredConfig",
    "StructuredLayer",
    "StructuredLinear",
    "StructuredModel",
    "TensorTrain",
    "Toeplitz",
    "Tucker",
    "add_task_adapter",
    "structured_layers",
]
