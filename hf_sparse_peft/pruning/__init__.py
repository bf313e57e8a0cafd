"""Pruning of base weights in one shot, and the curve of what a model loses by it."""

from .one_shot import one_shot_pruned
from .sparsity_curve import EssentialSparsity, essential_sparsity

__all__ = ["EssentialSparsity", "essential_sparsity", "one_shot_pruned"]
