"""Structured adapters: Kronecker and other structures, maps of inputs and outputs, modules behind layers."""

from ..shared.registration import register_tuner
from .bottleneck import Bottleneck
from .config import StructuredConfig
from .form import Additive, Behind, Beside, Call, Form, Mapped, Site
from .givens import Givens, QuasiGivens
from .kronecker import Kronecker
from .layer import StructuredLayer, StructuredLinear
from .matrices import DenseMatrix, Matrix
from .model import StructuredModel, structured_layers
from .reflections import Reflections
from .scale_shift import ScaleShift

register_tuner(StructuredConfig, StructuredModel)

__all__ = [
    "Additive",
    "Behind",
    "Beside",
    "Bottleneck",
    "Call",
    "DenseMatrix",
    "Form",
    "Givens",
    "Kronecker",
    "Mapped",
    "Matrix",
    "QuasiGivens",
    "Reflections",
    "ScaleShift",
    "Site",
    "StructuredConfig",
    "StructuredLayer",
    "StructuredLinear",
    "StructuredModel",
    "structured_layers",
]
