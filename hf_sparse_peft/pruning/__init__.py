"""Pruning of base weights in one shot: for good, block by block, or for as long as a block of code runs."""

from .dsnot import DSnoT
from .input_statistics import InputStatistics
from .kept_units import KeptOfBlock, KeptUnits
from .one_shot import one_shot_pruned
from .one_shot_methods import MagnitudePruning, PruningMethod, RandomPruning, SparseGPT, Wanda
from .pruning_patterns import NM, PruningPattern, Unstructured
from .sparsity_curve import EssentialSparsity, essential_sparsity
from .structure import BlockStructure, Member, structures_of
from .walk import PruningReport, prune_model

__all__ = [
    "NM",
    "BlockStructure",
    "DSnoT",
    "EssentialSparsity",
    "InputStatistics",
    "KeptOfBlock",
    "KeptUnits",
    "MagnitudePruning",
    "Member",
    "PruningMethod",
    "PruningPattern",
    "PruningReport",
    "RandomPruning",
    "SparseGPT",
    "Unstructured",
    "Wanda",
    "essential_sparsity",
    "one_shot_pruned",
    "prune_model",
    "structures_of",
]
