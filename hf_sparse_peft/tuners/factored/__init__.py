"""Factored bases: weights replaced by low-rank and other compressed forms (WeLore, LoRD, PELA, ...)."""

from ..shared.registration import register_tuner
from .channel_bits import ChannelBits, PackedChannels
from .channel_report import ChannelStatistics, channel_report
from .codebooks import Codebooks
from .config import FactoredConfig
from .cur import CUR
from .dense_sparse import DenseSparse
from .form import Form
from .group_bits import GroupBits, PackedGroups
from .layer import FactoredLayer, FactoredLinear
from .low_rank import LowRank
from .low_rank_sparse import LowRankSparse
from .model import FactoredModel, factored_layers
from .output_features import OutputFeatures
from .ranks import (
    EnergyFraction,
    FixedRank,
    LargestRankFraction,
    ParameterRatio,
    RankChoice,
    SideFraction,
    SingularValueThreshold,
)
from .spectral import Spectral
from .whole import Whole

register_tuner(FactoredConfig, FactoredModel)

__all__ = [
    "CUR",
    "ChannelBits",
    "ChannelStatistics",
    "Codebooks",
    "DenseSparse",
    "EnergyFraction",
    "FactoredConfig",
    "FactoredLayer",
    "FactoredLinear",
    "FactoredModel",
    "FixedRank",
    "Form",
    "GroupBits",
    "LargestRankFraction",
    "LowRank",
    "LowRankSparse",
    "OutputFeatures",
    "PackedChannels",
    "PackedGroups",
    "ParameterRatio",
    "RankChoice",
    "SideFraction",
    "SingularValueThreshold",
    "Spectral",
    "Whole",
    "channel_report",
    "factored_layers",
]
