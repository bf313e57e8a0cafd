"""Floor 2: supports, scores, selection, schedules and budgets. Knows torch only.

UnitGrid                         what a unit is: an entry, a block, a row or a column
Score, select_units              importance of units by the weight, and the best k of them
DataCriterion                    importance of units estimated from data
top_units, random_units          exact selection in chunks
n_of_m_mask                      the largest so many of every few neighbours
encode_support, decode_support   a support as bytes of fixed length
Pattern, Grid                    in which shape supports may lie
Budget, *_counts                 how many units each layer gets, and what is left of them in the end
Curve, make_curve                how a number moves during training
soft_threshold, ...              what a proximal step does to numbers
"""

from .activations import Activation, WeightedActivation
from .allocation import (
    affordable,
    competition_counts,
    counts_from_rank,
    counts_from_total,
    erdos_renyi_counts,
    erdos_renyi_densities,
    global_counts,
    proportional_counts,
    uniform_counts,
)
from .bisection import largest_within
from .bit_planes import pack_planes, unpack_planes
from .bits import pack_bits, unpack_bits
from .block_gradient import BlockGradient, WarmedBlockGradient
from .budget import Budget, Competition, CountedUnits, Targets, Total
from .budget_groups import GlobalByGroup
from .budget_splits import (
    BelowThreshold,
    ByModule,
    ErdosRenyi,
    Global,
    Proportional,
    Split,
    UnitsPerModule,
    WholeTensors,
)
from .budget_totals import AverageRank, Density, Fraction, Numbers, RankEquivalent
from .codec import HEADER_BYTES, coded_grid, coded_header, coded_parts, codes_length, decode_support, encode_support
from .curves import (
    Constant,
    Cosine,
    Cubic,
    Curve,
    Exponential,
    Linear,
    Staircase,
    Window,
    make_curve,
    whole_steps,
)
from .gradient_flow import GradientFlow, MaskDecay, StructureDecay
from .group_envelope import envelope, envelope_prox, envelope_shares
from .kept_weights import KeptWeights
from .n_of_m import lowest_of_rows, n_of_m_mask
from .n_of_m_code import check_n_of_m, decode_n_of_m, encode_n_of_m, n_of_m_bytes
from .patterns import Everywhere, Grid, Pattern, Region, region_of
from .scores import (
    DecompositionResidual,
    LowRankMagnitude,
    Magnitude,
    Random,
    Score,
    SmallestMagnitude,
    chunks_of,
    make_score,
    select_units,
)
from .selection import (
    Source,
    count_selected,
    excluding,
    find_cut,
    random_units,
    random_units_outside,
    stream_seed,
    top_units,
)
from .shrinkage import dead_zone_threshold, nested_group_slopes, nested_group_threshold, soft_threshold
from .statistics import (
    SM3,
    DataCriterion,
    DeltaMagnitude,
    Fisher,
    Given,
    Gradient,
    Momentum,
    Movement,
    Sensitivity,
    Snip,
)
from .subgrid import best_subgrid
from .support import GRANULARITIES, Granularity, UnitGrid
from .weight_statistics import MeanGradient, MeanStepGradient, Statistic

__all__ = [
    "GRANULARITIES",
    "HEADER_BYTES",
    "SM3",
    "Activation",
    "AverageRank",
    "BelowThreshold",
    "BlockGradient",
    "Budget",
    "ByModule",
    "Competition",
    "Constant",
    "Cosine",
    "CountedUnits",
    "Cubic",
    "Curve",
    "DataCriterion",
    "DecompositionResidual",
    "DeltaMagnitude",
    "Density",
    "ErdosRenyi",
    "Everywhere",
    "Exponential",
    "Fisher",
    "Fraction",
    "Given",
    "Global",
    "GlobalByGroup",
    "Gradient",
    "GradientFlow",
    "Granularity",
    "Grid",
    "KeptWeights",
    "Linear",
    "LowRankMagnitude",
    "Magnitude",
    "MaskDecay",
    "MeanGradient",
    "MeanStepGradient",
    "Momentum",
    "Movement",
    "Numbers",
    "Pattern",
    "Proportional",
    "Random",
    "RankEquivalent",
    "Region",
    "Score",
    "Sensitivity",
    "SmallestMagnitude",
    "Snip",
    "Source",
    "Split",
    "Staircase",
    "Statistic",
    "StructureDecay",
    "Targets",
    "Total",
    "UnitGrid",
    "UnitsPerModule",
    "WarmedBlockGradient",
    "WeightedActivation",
    "WholeTensors",
    "Window",
    "affordable",
    "best_subgrid",
    "check_n_of_m",
    "chunks_of",
    "coded_grid",
    "coded_header",
    "coded_parts",
    "codes_length",
    "competition_counts",
    "count_selected",
    "counts_from_rank",
    "counts_from_total",
    "dead_zone_threshold",
    "decode_n_of_m",
    "decode_support",
    "encode_n_of_m",
    "encode_support",
    "envelope",
    "envelope_prox",
    "envelope_shares",
    "erdos_renyi_counts",
    "erdos_renyi_densities",
    "excluding",
    "find_cut",
    "global_counts",
    "largest_within",
    "lowest_of_rows",
    "make_curve",
    "make_score",
    "n_of_m_bytes",
    "n_of_m_mask",
    "nested_group_slopes",
    "nested_group_threshold",
    "pack_bits",
    "pack_planes",
    "proportional_counts",
    "random_units",
    "random_units_outside",
    "region_of",
    "select_units",
    "soft_threshold",
    "stream_seed",
    "top_units",
    "uniform_counts",
    "unpack_bits",
    "unpack_planes",
    "whole_steps",
]
