"""From a config and a model to a plan: how each weight is cut, how many units and components it has, what scales them,
and which units are chosen over the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import nn
from tqdm.auto import tqdm

from ...sparsity import Budget, DataCriterion, Given, Pattern, Targets, Total, UnitGrid, region_of, stream_seed
from ...sparsity.scores import Chunks
from ...utils.parts import UnknownPart
from ..shared.assumed_units import units_are_assumed
from ..shared.base_weight import dense_weight
from ..shared.layer import is_supported
from ..shared.model import AdapterPlan
from ..shared.module_patterns import pattern_key
from ..shared.parameters import ParameterHost, ParameterWeight
from ..shared.quantised import backend_of
from .config import SparseLoraConfig, exact_pattern
from .structures import choose_structures, structure_counts

_ROUNDING = 1e-9


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
    subnet: tuple[int, int] | None = None
    """Rows and columns of a subnet, which has neither grid nor units; None without one."""

    def as_list(self) -> list[int]:
        """As the config's `sizes` says an adapter that has what it has room for."""
        return [*(self.subnet or (self.capacity, self.capacity)), self.rank]


@dataclass(frozen=True)
class SupportPlan:
    """What is decided for the supports of a model, by module name."""

    counts: dict[str, int] = field(default_factory=dict)
    """Units of each support."""
    capacities: dict[str, int] = field(default_factory=dict)
    """Units allocated, room for retired ones included."""
    chosen: dict[str, torch.Tensor] = field(default_factory=dict)
    """The units themselves, where modules select together (`config.structures`)."""
    subnets: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows and columns of each subnet."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks of the low-rank half, where the budget gives some of it to them."""


def plan_adapter(config: SparseLoraConfig, model: nn.Module, targets: dict[str, nn.Module]) -> AdapterPlan:
    """Sizes of both halves in every module of `targets` (base layers by module name), and the units of supports that
    are chosen over the whole model. Neither the config nor the model is changed.

    Raises:
        ValueError: the budget, the structures or the config's patterns do not fit the model.
    """
    # Whatever else matched is refused by name when its layer is created.
    layers = {name: base for name, base in targets.items() if is_supported(base, _backend(base, model))}
    plan, sizes = plan_supports(config, layers, model), {}
    for name, base in layers.items():
        cols, rows = _get_in_out_features(base)
        units, capacity = plan.counts.get(name, 0), plan.capacities.get(name, 0)
        subnet = plan.subnets.get(name)
        sizes[name] = module_sizes(config, name, rows, cols, units, capacity, plan.ranks.get(name), subnet)
    slow = getattr(config.criterion, "is_slow", False) and not config.inference_mode
    slow = slow and plan.counts and not plan.chosen
    progress = tqdm(total=len(targets), desc="Selecting supports", delay=3) if slow else None
    return AdapterPlan(sizes, plan.chosen, progress)


def module_sizes(
    config: SparseLoraConfig,
    name: str,
    rows: int,
    cols: int,
    units: int,
    capacity: int = 0,
    rank: int | None = None,
    subnet: tuple[int, int] | None = None,
) -> ModuleSizes:
    """Sizes of the module of that name with `units` units, `capacity` at least, or a `subnet`, and `rank` or else the
    config's rank.

    Raises:
        ValueError: the weight has fewer units, blocks do not divide it, or `scale_support` has no scaling to take.
    """
    granularity = config.granularity_of(name)
    grid = UnitGrid(rows, cols, granularity, config.cut_size_of(granularity)) if units else None
    if units and units > grid.num_units:
        raise ValueError(
            f"The support of '{name}' wants {units} {grid.unit_name} units, and its {rows}x{cols} weight has "
            f"{grid.num_units}. Lower the budget."
        )
    if units and config.known_pattern is not None:
        config.known_pattern.check_grid(grid, name)
        config.known_pattern.check_count(max(capacity, units), grid, name)
    rank = config.rank_of(name) if rank is None else rank
    scaling = low_rank_scaling(config, name, rank)
    sparse = bool(units) or subnet is not None
    if sparse and config.scale_support is True and not rank:
        raise ValueError(
            f"scale_support multiplies the support of '{name}' by lora_alpha / r, and rank_pattern gives it rank 0. "
            "Give it a rank, or set scale_support=False."
        )
    multiplier = config.scale_support or 1.0
    support_scaling = (scaling if multiplier is True else float(multiplier)) if sparse else None
    return ModuleSizes(grid, units, max(capacity, units), rank, scaling, support_scaling, subnet)


def low_rank_scaling(config: SparseLoraConfig, name: str, rank: int) -> float | None:
    """What multiplies the low-rank half of the module of that name; None at rank 0."""
    return config.alpha_of(name) / (math.sqrt(rank) if config.use_rslora else rank) if rank else None


def subnet_sides(config: SparseLoraConfig, rows: int, cols: int, numel: int) -> tuple[int, int]:
    """Rows and columns of a subnet of a `[rows, cols]` weight: `subnet_shares` of either, else nearly equal shares of
    which at most `numel` entries come."""
    if config.subnet_shares is not None:
        return tuple(max(1, int(share * n)) for share, n in zip(config.subnet_shares, (rows, cols), strict=True))
    own_rows = max(1, int(math.sqrt(numel / (rows * cols)) * rows + _ROUNDING))
    return own_rows, min(cols, max(1, numel // own_rows))


def sizes_for_config(config: SparseLoraConfig, sizes: Mapping[str, ModuleSizes]) -> dict[str, list[int]]:
    """What the config's `sizes` has to say of a new adapter, so that shapes follow from the config when it is loaded or
    resumed: empty where every count follows from the module alone, or waits for data."""
    if config.sizes or not config.has_support or config.calibrates_sizes:
        return config.sizes
    budget = config.support_budget
    extra = any(module.capacity != module.units for module in sizes.values())
    if not (config.structures or extra or (budget is not None and not budget.follows_from_module)):
        return {}
    return {name: [*(one.subnet or (one.units, one.capacity)), one.rank] for name, one in sizes.items()}


def note_sizes(config: SparseLoraConfig, sizes: Mapping[str, ModuleSizes]) -> None:
    """Write sizes that a file brought or compaction left, by module name, into `sizes` and `alpha_pattern`."""
    # Ranks that data has found keep the scaling that the config gives to any rank.
    found = config.calibrates_sizes
    reranked = not found and any(module.rank != config.rank_of(name) for name, module in sizes.items())
    if config.has_support or reranked or found:
        config.sizes = {name: module.as_list() for name, module in sizes.items()}
    if reranked:
        alphas = {}
        for name, module in sizes.items():
            if module.scaling is not None:
                alphas[name] = module.scaling * (module.rank**0.5 if config.use_rslora else module.rank)
        config.alpha_pattern = exact_pattern(alphas)


def plan_supports(config: SparseLoraConfig, layers: dict[str, nn.Module], model: nn.Module) -> SupportPlan:
    """Units of the support of every module of `layers`, checked for the whole model before a layer changes.

    Raises:
        ValueError: the budget leaves a module without a unit or exceeds the weights, blocks or structures do not fit,
            or `sizes` was made for another model.
    """
    if not config.has_support:
        return SupportPlan()
    if config.sizes:
        return _plan_of_sizes(config, layers, model)
    grids = _grids(config, layers)
    for part in (config.criterion, config.pattern):
        for name, grid in grids.items() if isinstance(part, (DataCriterion, Pattern)) else ():
            part.check_grid(grid, name)
    subnets = {name: grid for name, grid in grids.items() if config.granularity_of(name) == "subnet"}
    own_sides = {}
    if config.subnet_shares is not None:
        own_sides = {name: subnet_sides(config, grid.rows, grid.cols, 0) for name, grid in subnets.items()}
    chosen = _choose_structures(config, layers, grids, model)
    counts = {name: units.numel() for name, units in chosen.items()}
    if config.structures and config.needs_calibration:
        counts = structure_counts(config.structures, grids, model)
    decided = counts.keys() | own_sides
    targets = _targets(config, layers, {name: grid for name, grid in grids.items() if name not in decided}, model)
    budget, ranks = config.support_budget, {}
    if targets.grids and budget is not None:
        if isinstance(budget, UnknownPart):
            config.check_runnable()
        _check_patterns(budget, targets)
        counts |= _counts(config, targets)
        ranks = budget.ranks(targets)
    sides = own_sides | {
        name: subnet_sides(config, grid.rows, grid.cols, counts.pop(name))
        for name, grid in subnets.items()
        if name in counts
    }
    if config.calibrates_sizes:
        return SupportPlan(counts, counts, chosen)  # of no meaning yet: what data or a file says is written then
    capacities = {name: _capacity(config, count, grids[name]) for name, count in counts.items()}
    return SupportPlan(counts, capacities, chosen, sides, ranks)


def _choose_structures(
    config: SparseLoraConfig, layers: dict[str, nn.Module], grids: dict[str, UnitGrid], model: nn.Module
) -> dict[str, torch.Tensor]:
    if not config.structures or config.needs_calibration:
        return {}
    return choose_structures(
        config.structures,
        config.criterion,
        config.seed,
        grids,
        model,
        lambda name: _score_chunks(config, name, layers[name], grids[name], model),
    )


def _plan_of_sizes(config: SparseLoraConfig, layers: dict[str, nn.Module], model: nn.Module) -> SupportPlan:
    missing = sorted(set(layers) - set(config.sizes))
    if missing:
        raise ValueError(
            f"sizes was made for another model: it has no entry for {missing[:3]} ({len(missing)} modules). Set "
            "sizes={} to split the budget anew."
        )
    if not config.structures:
        layers = {name: base for name, base in layers.items() if config.sizes[name][1]}
    grids = _grids(config, layers)
    subnets = {name: tuple(config.sizes[name][:2]) for name in grids if config.granularity_of(name) == "subnet"}
    for name, (rows, cols) in subnets.items():
        grid = grids.pop(name)
        if rows > grid.rows or cols > grid.cols:
            raise ValueError(
                f"sizes gives '{name}' a subnet of {rows}x{cols}, and its weight is {grid.rows}x{grid.cols}. Was it "
                "made for another model? Set sizes={} to split the budget anew."
            )
    chosen = {} if config.inference_mode else _choose_structures(config, layers, grids, model)
    counts = {name: config.sizes[name][0] for name in config.sizes if name not in subnets}
    capacities = {name: config.sizes[name][1] for name in counts}
    for name, grid in grids.items():
        if capacities[name] > grid.num_units:
            raise ValueError(
                f"sizes gives '{name}' {capacities[name]} units, and its {grid.rows}x{grid.cols} weight has "
                f"{grid.num_units} of granularity '{grid.granularity}'. Was it made for another model? Set sizes={{}} "
                "to split the budget anew."
            )
    # Compaction may have left other counts than the structures give; a file is about to fill those.
    chosen = {name: units for name, units in chosen.items() if units.numel() == counts[name]}
    return SupportPlan(counts, capacities, chosen, subnets)


def _targets(
    config: SparseLoraConfig, layers: dict[str, nn.Module], grids: dict[str, UnitGrid], model: nn.Module
) -> Targets:
    waits = config.needs_calibration or isinstance(config.criterion, UnknownPart) or units_are_assumed()
    factors = {name: config.rank_of(name) * (grid.rows + grid.cols) for name, grid in grids.items()}
    return Targets(
        grids,
        config.seed,
        None if waits else lambda name: _score_chunks(config, name, layers[name], grids[name], model),
        {name: numel for name, numel in factors.items() if numel},
        find_pattern,
        partial(matrix_entries, model),
    )


def matrix_entries(model: nn.Module) -> int:
    """Entries of all two-dimensional weights of a model, its embeddings and its head included, each once; quantised
    ones at the size that they stand for, without those of adapters, and with the experts that one adapts."""
    seen: set[int] = set()

    def entries(module: nn.Module) -> int:
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            return base.weight.numel() if isinstance(base, ParameterWeight) else entries(base)
        if isinstance(module, ParameterHost):
            adapted = dict(module.parameter_layers())
            own = (p for name, p in module.base_layer.named_parameters() if p.ndim == 2 and name not in adapted)
            return sum(map(entries, adapted.values())) + sum(p.numel() for p in own)
        if isinstance(module, AuxiliaryTrainingWrapper):
            return entries(module.original_module)
        total = 0
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim != 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            packed = isinstance(module, nn.Linear) and name == "weight"
            total += module.in_features * module.out_features if packed else parameter.numel()
        return total + sum(map(entries, module.children()))

    return entries(model)


def find_pattern(patterns: Mapping[str, Any], module_name: str) -> str | None:
    """The pattern of a budget that holds for the module, None without one."""
    return pattern_key(patterns, module_name, "budget")


def _counts(config: SparseLoraConfig, targets: Targets) -> dict[str, int]:
    total = getattr(config.support_budget, "total", config.support_budget)
    if isinstance(config.criterion, Given) and isinstance(total, Total) and not config.structures:
        density = total.density(targets)  # any number may be given: room for a few
        return {name: max(1, int(density * grid.num_units)) for name, grid in targets.grids.items()}
    return config.support_budget.counts(targets)


def _check_patterns(budget: Budget, targets: Targets) -> None:
    used = {targets.find(dict.fromkeys(budget.patterns), name) for name in targets.grids}
    unused = sorted(set(budget.patterns) - used)
    if unused:
        raise ValueError(
            f"budget={type(budget).__name__} names {unused}, and no targeted module matches. It takes module names or "
            f"regexes of: {', '.join(list(targets.grids)[:3])}, ... Correct the name, or add the module to "
            "target_modules."
        )


def _capacity(config: SparseLoraConfig, count: int, grid: UnitGrid) -> int:
    """Units allocated: the count, and room for `floor(Rule.extra_capacity * count)` more where the weight has it."""
    extra = 0.0 if config.training_finished else max((rule.extra_capacity for rule in config.rules), default=0.0)
    return min(grid.num_units, count + int(extra * count))


def _grids(config: SparseLoraConfig, layers: dict[str, nn.Module]) -> dict[str, UnitGrid]:
    grids = {}
    for name, base in layers.items():
        cols, rows = _get_in_out_features(base)
        granularity = config.granularity_of(name)
        try:  # a subnet's numbers are counted, and ranked, as entries
            cut = "entry" if granularity == "subnet" else granularity
            grids[name] = UnitGrid(rows, cols, cut, config.cut_size_of(cut))
            if isinstance(base, ParameterWeight) and cut == "block":
                UnitGrid(base.rows_of_one, cols, cut, config.block_size)  # no block over two experts
            if isinstance(base, ParameterWeight) and cut == "diagonal":
                raise ValueError(
                    "granularity='diagonal' has one diagonal a weight, and this one is the weights of "
                    f"{rows // base.rows_of_one} experts, each of which would learn another part. Choose another "
                    "granularity in granularity_pattern, or leave it out of target_parameters."
                )
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
    return grids


def _backend(base: nn.Module, model: nn.Module) -> Any:
    return backend_of(base, **get_quantization_kwargs(model))


def _score_chunks(config: SparseLoraConfig, name: str, base: nn.Module, grid: UnitGrid, model: nn.Module) -> Chunks:
    """Score chunks of one module, computed anew at each pass so that one dense weight is alive at a time."""

    def chunks():
        weight = dense_weight(base, _backend(base, model))
        generator = torch.Generator(device=weight.device).manual_seed(stream_seed(config.seed, name))
        scores = config.criterion(weight, grid, generator)
        seed = generator.initial_seed()
        return region_of(config.known_pattern, scores, grid, seed=seed).masked(scores)()

    return chunks
