"""Floor 4: what happens to the units of an adapter while it trains. One file a rule.

space.py         what a rule sees of a layer          moves.py         the one way that units change
run.py           what a rule sees of a training run   update_mask.py   who is updated
rule.py          the base of all rules, which pairs compose      pairs.py    the table of these
prune.py         units leave along a curve        search_support.py   the best of some random supports
regrow.py        supports move                        drop.py, growth.py   who leaves, who enters
relocate_subnets.py  subnets move to other rows and columns, a layer at a time
allocate.py      one budget for all layers            scores.py        which units matter
orthogonality.py, frobenius_decay.py    pulls on low-rank factors    pair_orthogonality.py   on maps of pairs
sample_rank.py, grow_rank.py, proximal_gate.py    ranks that are nested, that grow, that a threshold cuts
sample_vectors.py            singular vectors that train in turns
balance_loss.py  experts that are to take equally many tokens
bit_penalty.py   a price on the bits of weights that train through their quantiser
group_lasso.py   ranks that shrink from their end
stable_rank.py   ranks that are cut once they have settled
trained_rank_pruning.py   weights that are cut to low rank while they train
largest_error.py    a pull on what is furthest from the base
gradient_noise.py, adaptive_row_scale.py    noise on weights, gradients by the rows of the update
entering.py      units that begin to train late
factor_experts.py    the experts of split factors that a pass uses
choose_support.py    a support is chosen by gradients after a warm-up
freeze.py        entries stop training                frozen.py        units that are excluded from the update
freeze_gradually.py     columns of a basis stop training, one after the other
alternate_modules.py    a fraction of the modules is updated per period
distil.py, distil_features.py    the base without its adapter as a teacher
train_nm.py, input_masks.py    N:M sparsity while weights train
error_feedback.py    what is off a mask learns by the masked weight's gradient
learn_mask.py, cast.py     masks by trained scores, and of weights that the optimizer drove to 0
penalties.py     L1 and nuclear norm on what trains
lobster.py, serene.py, mask_sparsity.py     pulls on what the loss or the outputs do not need, or that is to go
plateau_threshold.py    units below a threshold leave once the loss is flat
group_envelope.py, half_space.py, hesso.py     groups that become 0 whole    groups.py    units as groups of numbers
neuron_sensitivity.py   how much outputs depend on pre-activations
sample_layers.py, switch_layers.py    drawn transformer layers train    drawn_layers.py    what they share
layer_choices.py        which layers these are
probing.py       passes beside training
"""

from .adaptive_row_scale import AdaptiveRowScale
from .allocate import Allocate
from .alternate_modules import AlternateModules
from .balance_loss import BalanceLoss
from .bit_penalty import BitPenalty
from .cast import Cast
from .choose_support import ChooseSupport
from .distil import Distil
from .distil_features import DistilFeatures
from .drop import Age, Drop, Magnitude, Sensitivity, SignedMagnitude
from .entering import ConstantRate, EnteringRate, OwnClock, RunRate
from .error_feedback import ErrorFeedback
from .factor_experts import ExpertDraw, FactorExperts
from .freeze import Freeze
from .freeze_gradually import FreezeGradually
from .frobenius_decay import FrobeniusDecay
from .gradient_noise import GradientNoise
from .group_envelope import GroupEnvelope
from .group_lasso import GroupLasso
from .grow_rank import GrowRank
from .growth import SM3, AccumulatedGradient, Gradient, Growth, LowRankMagnitude, Move
from .half_space import HalfSpace
from .hesso import Hesso
from .input_masks import InputMask, OutputGroups, PermutedOutputGroups
from .l1_norm import L1Norm
from .largest_error import LargestError
from .layer_choices import Cyclic, LargestGradient, LayerChoice, Outliers, Uniform
from .learn_mask import LearnMask
from .lobster import Lobster
from .mask_sparsity import MaskSparsity
from .moves import MoveResult, move_units
from .orthogonality import Orthogonality
from .pair_orthogonality import PairOrthogonality
from .penalties import L1Penalty, NuclearNorm
from .plateau_threshold import PlateauThreshold
from .proximal_gate import ProximalGate
from .prune import Prune
from .random_growth import Random, RandomUnfired
from .regrow import Regrow
from .relocate_subnets import RelocateSubnets
from .rule import RankRule, Rule, check_pairs, check_schedule, conflict, in_order
from .run import Run, Training, leave_update_out, refuse_unskippable
from .sample_layers import SampleLayers
from .sample_rank import SampleRank
from .sample_vectors import SampleVectors
from .scores import ModuleSensitivity, Smoothed, TrainingScore, Windowed
from .search_support import SearchSupport
from .serene import SeReNe
from .space import ComponentSpace, Follower, ModuleSpace, TensorSpace, UnitSpace
from .stable_rank import StableRank
from .switch_layers import SwitchLayers
from .train_nm import TrainNM
from .trained_rank_pruning import TrainedRankPruning
from .update_mask import UpdateMask

__all__ = [
    "SM3",
    "AccumulatedGradient",
    "AdaptiveRowScale",
    "Age",
    "Allocate",
    "AlternateModules",
    "BalanceLoss",
    "BitPenalty",
    "Cast",
    "ChooseSupport",
    "ComponentSpace",
    "ConstantRate",
    "Cyclic",
    "Distil",
    "DistilFeatures",
    "Drop",
    "EnteringRate",
    "ErrorFeedback",
    "ExpertDraw",
    "FactorExperts",
    "Follower",
    "Freeze",
    "FreezeGradually",
    "FrobeniusDecay",
    "Gradient",
    "GradientNoise",
    "GroupEnvelope",
    "GroupLasso",
    "GrowRank",
    "Growth",
    "HalfSpace",
    "Hesso",
    "InputMask",
    "L1Norm",
    "L1Penalty",
    "LargestError",
    "LargestGradient",
    "LayerChoice",
    "LearnMask",
    "Lobster",
    "LowRankMagnitude",
    "Magnitude",
    "MaskSparsity",
    "ModuleSensitivity",
    "ModuleSpace",
    "Move",
    "MoveResult",
    "NuclearNorm",
    "Orthogonality",
    "Outliers",
    "OutputGroups",
    "OwnClock",
    "PairOrthogonality",
    "PermutedOutputGroups",
    "PlateauThreshold",
    "ProximalGate",
    "Prune",
    "Random",
    "RandomUnfired",
    "RankRule",
    "Regrow",
    "RelocateSubnets",
    "Rule",
    "Run",
    "RunRate",
    "SampleLayers",
    "SampleRank",
    "SampleVectors",
    "SeReNe",
    "SearchSupport",
    "Sensitivity",
    "SignedMagnitude",
    "Smoothed",
    "StableRank",
    "SwitchLayers",
    "TensorSpace",
    "TrainNM",
    "TrainedRankPruning",
    "Training",
    "TrainingScore",
    "Uniform",
    "UnitSpace",
    "UpdateMask",
    "Windowed",
    "check_pairs",
    "check_schedule",
    "conflict",
    "in_order",
    "leave_update_out",
    "move_units",
    "refuse_unskippable",
]
