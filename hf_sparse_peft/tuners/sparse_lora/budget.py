"""Sizes of the supports of a model: what the budget, the structures and `sizes` say, decided once at injection."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...sparsity import Budget, DataCriterion, Given, Targets, Total, UnitGrid, stream_seed
from ...utils.parts import UnknownPart
from ..shared.module_patterns import pattern_key
from ..shared.target_checks import target_layers
from ..shared.wrapped_names import plain_name
from .config import SparseLoraConfig
from .structures import choose_structures, structure_counts


@dataclass(frozen=True)
class SupportPlan:
    """What was decided for the supports of a model, by module name."""

    counts: dict[str, int] = field(default_factory=dict)
    """Units of each support."""
    capacities: dict[str, int] = field(default_factory=dict)
    """Units allocated, room for retired ones included."""
    chosen: dict[str, torch.Tensor] = field(default_factory=dict)
    """The units themselves, where modules select together (`config.structures`)."""


def plan_supports(config: SparseLoraConfig, model: nn.Module, matches) -> SupportPlan:
    """Units of every targeted module's support, checked for the whole model before a layer changes.

    Counts that do not follow from the module alone (a budget over the model, structures, room for retired units) are
    written to `config.sizes`, so that shapes follow from the config when the adapter is loaded or resumed.

    Raises:
        ValueError: the budget leaves a module without a unit or exceeds the weights, blocks or structures do not fit,
            or `sizes` was made for another model.
    """
    if not config.has_support:
        return SupportPlan()
    # Whatever else matched is refused by name when its layer is created.
    layers = {
        plain_name(name): base for name, base in target_layers(config, model, matches).items() if is_linear(base, model)
    }
    if config.sizes:
        return _plan_of_sizes(config, layers, model)
    grids = _grids(config, layers)
    if isinstance(config.criterion, DataCriterion):
        for name, grid in grids.items():
            config.criterion.check_grid(grid, name)
    chosen = {}
    if config.structures and not config.data_driven:
        chosen = choose_structures(config, grids, model, lambda n: _score_chunks(config, n, layers[n], grids[n], model))
    counts = {name: units.numel() for name, units in chosen.items()}
    if config.structures and config.data_driven:
        counts = structure_counts(config, grids, model)
    targets = _targets(config, layers, {name: grid for name, grid in grids.items() if name not in counts}, model)
    budget, ranks = config.support_budget, {}
    if targets.grids and budget is not None:
        if isinstance(budget, UnknownPart):
            config.check_runnable()
        _check_patterns(budget, targets)
        counts |= _counts(config, targets)
        ranks = budget.ranks(targets)
    if config.sizes_from_data:
        return SupportPlan(counts, counts, chosen)  # of no meaning yet: what data or a file says is written then
    capacities = {name: _capacity(config, count, grids[name]) for name, count in counts.items()}
    if config.structures or capacities != counts or (budget is not None and not budget.follows_from_module):
        found = {n: [counts.get(n, 0), capacities.get(n, 0), ranks.get(n, config.rank_of(n))] for n in grids}
        config.sizes = found
    return SupportPlan(counts, capacities, chosen)


def _plan_of_sizes(config: SparseLoraConfig, layers: dict[str, nn.Module], model: nn.Module) -> SupportPlan:
    missing = sorted(set(layers) - set(config.sizes))
    if missing:
        raise ValueError(
            f"sizes was made for another model: it has no entry for {missing[:3]} ({len(missing)} modules). Set "
            "sizes={} to share the budget out anew."
        )
    if not config.structures:
        layers = {name: base for name, base in layers.items() if config.sizes[name][1]}
    grids, chosen = _grids(config, layers), {}
    if config.structures and not config.data_driven and not config.inference_mode:
        chosen = choose_structures(config, grids, model, lambda n: _score_chunks(config, n, layers[n], grids[n], model))
    counts = {name: config.sizes[name][0] for name in config.sizes}
    capacities = {name: config.sizes[name][1] for name in config.sizes}
    for name, grid in grids.items():
        if capacities[name] > grid.num_units:
            raise ValueError(
                f"sizes gives '{name}' {capacities[name]} units, and its {grid.rows}x{grid.cols} weight has "
                f"{grid.num_units} of granularity '{grid.granularity}'. Was it made for another model? Set sizes={{}} "
                "to share the budget out anew."
            )
    # Compaction may have left other counts than the structures give; a file is about to fill those.
    return SupportPlan(counts, capacities, {n: units for n, units in chosen.items() if units.numel() == counts[n]})


def _targets(
    config: SparseLoraConfig, layers: dict[str, nn.Module], grids: dict[str, UnitGrid], model: nn.Module
) -> Targets:
    waits = config.data_driven or isinstance(config.criterion, UnknownPart)
    factors = {name: config.rank_of(name) * (grid.rows + grid.cols) for name, grid in grids.items()}
    return Targets(
        grids,
        config.seed,
        None if waits else lambda name: _score_chunks(config, name, layers[name], grids[name], model),
        {name: numel for name, numel in factors.items() if numel},
        lambda patterns, name: pattern_key(patterns, name, "budget"),
    )


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
    share = 0.0 if config.training_finished else max((rule.extra_capacity for rule in config.rules), default=0.0)
    return min(grid.num_units, count + int(share * count))


def _grids(config: SparseLoraConfig, layers: dict[str, nn.Module]) -> dict[str, UnitGrid]:
    grids = {}
    for name, base in layers.items():
        cols, rows = _get_in_out_features(base)
        try:
            grids[name] = UnitGrid(rows, cols, config.granularity_of(name), config.block_size)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
    return grids


def is_linear(base: nn.Module, model: nn.Module) -> bool:
    backend = resolve_quantization_backend(base, **get_quantization_kwargs(model))
    return backend is not None or isinstance(base, (nn.Linear, Conv1D))


def _score_chunks(config: SparseLoraConfig, name: str, base: nn.Module, grid: UnitGrid, model: nn.Module):
    """Score chunks of one module, computed anew at each pass so that one dense weight is alive at a time."""

    def chunks():
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(model))
        weight = base.weight.data if backend is None else backend.get_base_weight(base)
        weight = weight.t() if backend is None and isinstance(base, Conv1D) else weight
        generator = torch.Generator(device=weight.device).manual_seed(stream_seed(config.seed, name))
        return config.criterion(weight, grid, generator)()

    return chunks
