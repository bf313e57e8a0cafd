"""Optimizers for supports that move, and the one function that edits optimizer state."""

from .adam_r import AdamR, AdamRSpec
from .adam_s import AdamS
from .aged_adamw import AgedAdamW, aged_adamw_groups
from .groups import embeddings_and_heads, parameter_groups
from .mkor import MeanVectors, Mkor, MkorSpec, rank_one_inverse
from .moves import adam_seeds, bias_correction, move_optimizer_state, move_rows, restart_optimizer_state
from .muon import Muon, newton_schulz
from .optimizer_kinds import innermost, use_32bit_states
from .projected_adamw import ProjectedAdamW
from .projected_spec import ProjectedAdamWSpec
from .projections import (
    BlockProjection,
    ColumnProjection,
    EntryProjection,
    Projection,
    RandomProjection,
    SVDProjection,
)
from .removed_parameters import forget_removed, forgets_removed, note_kept, note_removed
from .residuals import GradientResidual, NormScaledResidual, Residual, SignResidual
from .sm3 import SparseSM3
from .spec import OptimizerSettings, OptimizerSpec
from .zeroth_order import ZerothOrderSGD, zeroth_order_groups
from .zeroth_order_log import replay

__all__ = [
    "AdamR",
    "AdamRSpec",
    "AdamS",
    "AgedAdamW",
    "BlockProjection",
    "ColumnProjection",
    "EntryProjection",
    "GradientResidual",
    "MeanVectors",
    "Mkor",
    "MkorSpec",
    "Muon",
    "NormScaledResidual",
    "OptimizerSettings",
    "OptimizerSpec",
    "ProjectedAdamW",
    "ProjectedAdamWSpec",
    "Projection",
    "RandomProjection",
    "Residual",
    "SVDProjection",
    "SignResidual",
    "SparseSM3",
    "ZerothOrderSGD",
    "adam_seeds",
    "aged_adamw_groups",
    "bias_correction",
    "embeddings_and_heads",
    "forget_removed",
    "forgets_removed",
    "innermost",
    "move_optimizer_state",
    "move_rows",
    "newton_schulz",
    "note_kept",
    "note_removed",
    "parameter_groups",
    "rank_one_inverse",
    "replay",
    "restart_optimizer_state",
    "use_32bit_states",
    "zeroth_order_groups",
]
