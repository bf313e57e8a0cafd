# ruff: noqa: E402 (a peft that is too old is named before anything of it is missed)
"""What every tuner shares, and what a tuner of somebody else is made of: config, layer, tensors, pieces, model."""

from .registration import check_peft, register_tuner

check_peft()

from .config import AdapterConfig
from .layer import AdapterLayer
from .linear import AdditiveLinear
from .model import AdapterModel
from .pieces import BaseMask, Decomposed, Entries, LowRank, Piece, Subgrid, Tiles

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "AdapterModel",
    "AdditiveLinear",
    "BaseMask",
    "Decomposed",
    "Entries",
    "LowRank",
    "Piece",
    "Subgrid",
    "Tiles",
    "register_tuner",
]
