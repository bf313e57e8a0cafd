"""Factored bases: weights replaced by low-rank and other compressed forms (WeLore, LoRD, PELA, ...)."""

from ..shared.registration import register_tuner
from .codebooks import Codebooks
from .config import FactoredConfig
from .cur import CUR
from .dense_sparse import DenseSparse
from .form import Form
from .layer import FactoredLayer, FactoredLinear
from .low_rank import LowRank
from .low_rank_sparse import LowRankSparse
from .model import FactoredModel, factored_layers
from .ranks import EnergyFraction, FixedRank, ParameterRatio, RankRule, SideFraction, SingularValueThreshold
from .spectral import Spectral

register_tuner(FactoredConfig, FactoredModel)

__all__ = [
    "CUR",
    "Codebooks",
    "DenseSparse",
    "EnergyFraction",
    "FactoredConfig",
    "FactoredLayer",
    "FactoredLinear",
    "FactoredModel",
    "FixedRank",
    "Form",
    "LowRank",
    "LowRankSparse",
    "ParameterRatio",
    "RankRule",
    "SideFraction",
    "SingularValueThreshold",
    "Spectral",
    "factored_layers",
]
