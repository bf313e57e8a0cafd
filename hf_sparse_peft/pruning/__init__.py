"""Pruning of base weights in one shot: for good, block by block, or for as long as a block of code runs."""

from .apoptosis import OBA
from .block_influence import block_angles, block_influence
from .cfsp import CFSP, importance_lora_config
from .dropped_blocks import drop_blocks
from .dsee import apply_masks, kept_by_update
from .dsnot import DSnoT
from .eora import Compensation, LowRankCorrection, compensate, eigenspace_correction
from .global_pruning import prune_globally
from .gqsa import GQSA, Groups
from .input_statistics import InputStatistics
from .iso_flop import doped_ranks, iso_flop_size
from .kept_units import KeptOfBlock, KeptUnits
from .laser import LaserEdit, laser, search_laser
from .learned_masks import LearnedMasks
from .light_peft import EstimateImportance, Importance, LightPEFTCallback, SecondStage
from .lora_prune import LoRAPruneCallback, PruneUnits
from .one_shot import one_shot_pruned
from .one_shot_methods import MagnitudePruning, PruningMethod, RandomPruning, SparseGPT, Wanda
from .pruning_patterns import NM, PruningPattern, Unstructured
from .pruning_report import PruningReport
from .reconstruction import Reconstruction, reconstruct
from .recovery import recover_adapter
from .sliced_files import kept_units_of, load_sliced, save_kept_units, save_sliced
from .slicing import slice_model
from .soups import Soup, sparse_soup
from .sparse_ift import sparse_ift
from .sparsity_curve import EssentialSparsity, essential_sparsity
from .structure import BlockStructure, Member, structures_of
from .structured_methods import HessianSaliency, LoRAPrune, StructuredPruning
from .structured_patterns import Blocks, Heads, Rows
from .transfer_pruning import LearnUnitMasks, TransferPruningCallback
from .unit_masks import UnitMasks, mask_units, unit_masks_of, unmask_units
from .walk import prune_model

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
