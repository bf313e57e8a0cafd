"""Pruning of base weights in one shot: for good, block by block, or for as long as a block of code runs."""

from .criteria.apoptosis import OBA
from .criteria.block_influence import block_angles, block_influence
from .criteria.cfsp import CFSP, importance_lora_config
from .criteria.dsnot import DSnoT
from .criteria.gqsa import GQSA, Groups
from .criteria.one_shot_methods import MagnitudePruning, PruningMethod, RandomPruning, SparseGPT, Wanda
from .criteria.pruning_patterns import NM, PruningPattern, Unstructured
from .criteria.structured_methods import HessianSaliency, LoRAPrune, StructuredPruning
from .criteria.structured_patterns import Blocks, Heads, Rows
from .reading.input_statistics import InputStatistics
from .reading.one_shot import one_shot_pruned
from .removal.dropped_blocks import drop_blocks
from .removal.global_pruning import prune_globally
from .removal.pruning_report import PruningReport
from .removal.sparsity_curve import EssentialSparsity, essential_sparsity
from .removal.walk import prune_model
from .repair.dsee import apply_masks, kept_by_update
from .repair.eora import Compensation, LowRankCorrection, compensate, eigenspace_correction
from .repair.iso_flop import doped_ranks, iso_flop_size
from .repair.laser import LaserEdit, laser, search_laser
from .repair.reconstruction import Reconstruction, reconstruct
from .repair.recovery import recover_adapter
from .repair.soups import Soup, sparse_soup
from .repair.sparse_ift import sparse_ift
from .units.kept_units import KeptOfBlock, KeptUnits
from .units.sliced_files import kept_units_of, load_sliced, save_kept_units, save_sliced
from .units.slicing import slice_model
from .units.structure import BlockStructure, Member, structures_of
from .units.unit_masks import UnitMasks, mask_units, unit_masks_of, unmask_units
from .while_training.learned_masks import LearnedMasks
from .while_training.light_peft import EstimateImportance, Importance, LightPEFTCallback, SecondStage
from .while_training.lora_prune import LoRAPruneCallback, PruneUnits
from .while_training.transfer_pruning import LearnUnitMasks, TransferPruningCallback

__all__ = [
    "CFSP",
    "GQSA",
    "NM",
    "OBA",
    "BlockStructure",
    "Blocks",
    "Compensation",
    "DSnoT",
    "EssentialSparsity",
    "EstimateImportance",
    "Groups",
    "Heads",
    "HessianSaliency",
    "Importance",
    "InputStatistics",
    "KeptOfBlock",
    "KeptUnits",
    "LaserEdit",
    "LearnUnitMasks",
    "LearnedMasks",
    "LightPEFTCallback",
    "LoRAPrune",
    "LoRAPruneCallback",
    "LowRankCorrection",
    "MagnitudePruning",
    "Member",
    "PruneUnits",
    "PruningMethod",
    "PruningPattern",
    "PruningReport",
    "RandomPruning",
    "Reconstruction",
    "Rows",
    "SecondStage",
    "Soup",
    "SparseGPT",
    "StructuredPruning",
    "TransferPruningCallback",
    "UnitMasks",
    "Unstructured",
    "Wanda",
    "apply_masks",
    "block_angles",
    "block_influence",
    "compensate",
    "doped_ranks",
    "drop_blocks",
    "eigenspace_correction",
    "essential_sparsity",
    "importance_lora_config",
    "iso_flop_size",
    "kept_by_update",
    "kept_units_of",
    "laser",
    "load_sliced",
    "mask_units",
    "one_shot_pruned",
    "prune_globally",
    "prune_model",
    "reconstruct",
    "recover_adapter",
    "save_kept_units",
    "save_sliced",
    "search_laser",
    "slice_model",
    "sparse_ift",
    "sparse_soup",
    "structures_of",
    "unit_masks_of",
    "unmask_units",
]
