"""Factored bases: weights replaced by low-rank and other compressed forms (WeLore, LoRD, PELA, ...)."""

from ..shared.registration import register_tuner
from .config import FactoredConfig
from .form import Form
from .layer import FactoredLayer, FactoredLinear
from .low_rank import LowRank
from .model import FactoredModel, factored_layers
from .ranks import EnergyFraction, FixedRank, ParameterRatio, RankRule, SideFraction, SingularValueThreshold

register_tuner(FactoredConfig, FactoredModel)

__all__ = [
    "EnergyFraction",
    "FactoredConfig",
    "FactoredLayer",
    "FactoredLinear",
    "FactoredModel",
    "FixedRank",
    "Form",
    "LowRank",
    "ParameterRatio",
    "RankRule",
    "SideFraction",
    "SingularValueThreshold",
    "factored_layers",
]
