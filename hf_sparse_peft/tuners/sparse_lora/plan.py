"""From a config and a model to a plan: how each weight is cut, how many units and components it has, what scales them,
and which units are chosen over the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from tqdm.auto import tqdm

from ...sparsity import UnitGrid
from ..shared.model import AdapterPlan
from .budget import is_linear, plan_supports
from .config import SparseLoraConfig, exact_pattern


@dataclass(frozen=True)
class ModuleSizes:
    """Sizes of both halves of an adapter on one module; either may be 0."""

    grid: UnitGrid | None
    """How the weight is cut into units; None without a support."""
    units: int
    """Units of the first support."""
    capacity: int
    """Units that values and support have room for, retired ones included."""
    rank: int
    """Components of the low-rank half."""
    scaling: float | None = None
    """What multiplies the low-rank half, `lora_alpha / r` or `lora_alpha / sqrt(r)`; None without one."""
    support_scaling: float | None = None
    """What multiplies the sparse half; None without one."""

    def as_list(self) -> list[int]:
        """As the config's `sizes` says an adapter that has what it has room for."""
        return [self.capacity, self.capacity, self.rank]


def module_sizes(
    config: SparseLoraConfig, name: str, rows: int, cols: int, units: int, capacity: int = 0
) -> ModuleSizes:
    """Sizes of the module of that name with `units` units, `capacity` at least, and the config's rank.

    Raises:
        ValueError: the weight has fewer units, blocks do not divide it, or `scale_support` has no scaling to take.
    """
    grid = UnitGrid(rows, cols, config.granularity_of(name), config.block_size) if units else None
    if units and units > grid.num_units:
        raise ValueError(
            f"The support of '{name}' wants {units} {grid.granularity} units, and its {rows}x{cols} weight has "
            f"{grid.num_units}. Lower the budget."
        )
    rank = config.rank_of(name)
    scaling = config.alpha_of(name) / (math.sqrt(rank) if config.use_rslora else rank) if rank else None
    if units and config.scale_support and not rank:
        raise ValueError(
            f"scale_support multiplies the support of '{name}' by lora_alpha / r, and rank_pattern gives it rank 0. "
            "Give it a rank, or set scale_support=False."
        )
    support_scaling = (scaling if config.scale_support else 1.0) if units else None
    return ModuleSizes(grid, units, max(capacity, units), rank, scaling, support_scaling)


def plan_adapter(
    config: SparseLoraConfig, model: nn.Module, targets: dict[str, nn.Module], matches: Callable
) -> AdapterPlan:
    """Sizes of both halves in every module of `targets` (base layers by module name), and the units of supports that
    are chosen over the whole model.

    Raises:
        ValueError: the budget, the structures or the config's patterns do not fit the model.
    """
    plan = plan_supports(config, model, matches)
    sizes = {}
    for name, base in targets.items():
        if is_linear(base, model):  # whatever else matched is refused by name when its layer is created
            cols, rows = _get_in_out_features(base)
            sizes[name] = module_sizes(config, name, rows, cols, plan.counts.get(name, 0), plan.capacities.get(name, 0))
    slow = getattr(config.criterion, "is_slow", False) and not config.inference_mode
    slow = slow and plan.counts and not plan.chosen
    progress = tqdm(total=len(targets), desc="Selecting supports", delay=3) if slow else None
    return AdapterPlan(sizes, plan.chosen, progress)


def note_sizes(config: SparseLoraConfig, sizes: dict[str, ModuleSizes]) -> None:
    """Write sizes that follow from more than the config, by module name, into its `sizes` and `alpha_pattern`."""
    reranked = any(one.rank != config.rank_of(name) for name, one in sizes.items())
    if config.has_support or reranked:
        config.sizes = {name: one.as_list() for name, one in sizes.items()}
    if reranked:
        scaled = {name: one for name, one in sizes.items() if one.scaling is not None}
        alphas = {n: one.scaling * (one.rank**0.5 if config.use_rslora else one.rank) for n, one in scaled.items()}
        config.alpha_pattern = exact_pattern(alphas)
    if config.training_finished and config.factor_masks is not None and config.factor_masks.kind == "stochastic":
        config.factor_masks = None  # compaction has folded them
