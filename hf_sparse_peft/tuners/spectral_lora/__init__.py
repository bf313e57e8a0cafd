"""Spectral adapters: frozen or shared bases around a small trained core (LoRA-XS, SVFit, NOLA, LoLDU, ...)."""

from ..shared.registration import register_tuner
from .bases import Bases, RankChoice
from .config import SpectralLoraConfig
from .cores import Band, Core, Diagonal, Full, TwoFactors
from .drawn import RandomBases, RandomCombination
from .factors import Factors, RandomA
from .found import LDU, SVD, GradientSVD
from .layer import SpectralLoraLayer, SpectralLoraLinear
from .masked import MaskedB
from .model import SpectralLoraModel, spectral_layers
from .ranks import Energy, SpectrumSpread
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
    "Energy",
    "Factors",
    "Fastfood",
    "Full",
    "GradientSVD",
    "MaskedB",
    "RandomA",
    "RandomBases",
    "RandomCombination",
    "RankChoice",
    "Shards",
    "SharedBases",
    "SpectralLoraConfig",
    "SpectralLoraLayer",
    "SpectralLoraLinear",
    "SpectralLoraModel",
    "SpectrumSpread",
    "TwoFactors",
    "spectral_layers",
]
