"""Spectral adapters: frozen or shared bases around a small trained core (LoRA-XS, SVFit, NOLA, LoLDU, ...)."""

from ..shared.registration import register_tuner
from .bases import Bases
from .config import SpectralLoraConfig
from .cores import Band, Core, Diagonal, Full, TwoFactors
from .drawn import RandomBases, RandomCombination
from .found import LDU, SVD, GradientSVD
from .layer import SpectralLoraLayer, SpectralLoraLinear
from .model import SpectralLoraModel, spectral_layers
from .shared import Shards, SharedBases
from .subspace import Fastfood

register_tuner(SpectralLoraConfig, SpectralLoraModel)

__all__ = [
    "LDU",
    "SVD",
    "Band",
    "Bases",
    "Core",
    "Diagonal",
    "Fastfood",
    "Full",
    "GradientSVD",
    "RandomBases",
    "RandomCombination",
    "Shards",
    "SharedBases",
    "SpectralLoraConfig",
    "SpectralLoraLayer",
    "SpectralLoraLinear",
    "SpectralLoraModel",
    "TwoFactors",
    "spectral_layers",
]
