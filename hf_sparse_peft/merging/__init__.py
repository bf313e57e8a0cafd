"""Merging and editing of adapters: several become one, and one becomes smaller.

merge_adapters                           adapter folders -> an adapter, a LoRA or a dense model, weight by weight
Merge, register_merge                    a method as a row: sparsify x rescale x consensus x normalise
get_merge, merge_names, merge_info       the table of methods
fisher_importance                        what Fisher merging goes by
greedy_soup                              the mean of a choice of a model's adapters
find_q, analytic_q                       the rescaling of DAREx-q
PullToEarlier, EarlierAdaptersCallback   MOS: earlier tasks' adapters merged into the one that trains
compress_adapter, decompress_adapter     ComPEFT: an adapter <-> a file of ternary codes
binarise_adapter, restore_adapter        BitDelta: an adapter <-> a file of signs and magnitudes
distil_scales                            BitDelta's magnitudes, trained on logits
"""

from .binary import Binary, binarise_adapter, distil_scales, magnitude_groups, restore_adapter
from .class_incremental import EarlierAdaptersCallback, PullToEarlier
from .combine import merge_adapters
from .competition import Competition
from .consensus import (
    Agreeing,
    AgreeingWeights,
    Agreement,
    AllWeights,
    ByImportance,
    Consensus,
    ElectedSign,
    Everyone,
    Holders,
    Normalise,
    Undivided,
)
from .deltas import Deltas, Scan, stack_deltas
from .forms import MergeReport
from .importance import fisher_importance
from .rank_clusters import RankClusters
from .rates import analytic_q, find_q
from .rescale import ByNorm, ByProbability, ByQ, DareK, Rescale, Unscaled
from .row import Merge, MergeMethod, Update
from .soups import greedy_soup
from .sources import AdapterSource, read_source
from .sparsify import Band, DropByRank, DropRandom, KeepAll, Kept, Sparsify, TopFraction
from .table import MergeInfo, get_merge, merge_info, merge_names, merges_markdown, register_merge
from .ternary import CompactReport, Ternary, compress_adapter, decompress_adapter
from .unpacking import unpacked

__all__ = [
    "AdapterSource",
    "Agreeing",
    "AgreeingWeights",
    "Agreement",
    "AllWeights",
    "Band",
    "Binary",
    "ByImportance",
    "ByNorm",
    "ByProbability",
    "ByQ",
    "CompactReport",
    "Competition",
    "Consensus",
    "DareK",
    "Deltas",
    "DropByRank",
    "DropRandom",
    "EarlierAdaptersCallback",
    "ElectedSign",
    "Everyone",
    "Holders",
    "KeepAll",
    "Kept",
    "Merge",
    "MergeInfo",
    "MergeMethod",
    "MergeReport",
    "Normalise",
    "PullToEarlier",
    "RankClusters",
    "Rescale",
    "Scan",
    "Sparsify",
    "Ternary",
    "TopFraction",
    "Undivided",
    "Unscaled",
    "Update",
    "analytic_q",
    "binarise_adapter",
    "compress_adapter",
    "decompress_adapter",
    "distil_scales",
    "find_q",
    "fisher_importance",
    "get_merge",
    "greedy_soup",
    "magnitude_groups",
    "merge_adapters",
    "merge_info",
    "merge_names",
    "merges_markdown",
    "read_source",
    "register_merge",
    "restore_adapter",
    "stack_deltas",
    "unpacked",
]
