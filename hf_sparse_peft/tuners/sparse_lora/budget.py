"""How many units each targeted module gets, decided once for the whole model at injection."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...rules import Freeze
from ...sparsity import (
    DataCriterion,
    Given,
    UnitGrid,
    counts_from_rank,
    counts_from_total,
    erdos_renyi_counts,
    global_counts,
    proportional_counts,
    stream_seed,
    uniform_counts,
)
from ..shared.module_patterns import pattern_key
from ..shared.target_checks import target_layers
from ..shared.wrapped_names import plain_name
from .config import SparseLoraConfig
from .structures import choose_structures, structure_counts
from .whole_tensors import whole_tensor_counts


def plan_supports(
    config: SparseLoraConfig, model: nn.Module, matches
) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Units of every targeted module's support, by module name; checked for the whole model before a layer changes.

    Returns their counts, and the units themselves where modules select together (`config.structures`). Counts that
    follow from more than the module alone (`num_entries`, an allocation over the model, structures) are written to
    `config.support_pattern`, so that shapes follow from the config when the adapter is loaded or resumed.

    Raises:
        ValueError: the budget leaves a module without a unit or exceeds the weights, blocks or structures do not fit,
            or `support_pattern` was made for another model.
    """
    if not config.has_support:
        return {}, {}
    # Whatever else matched is refused by name when its layer is created.
    layers = {
        plain_name(name): base for name, base in target_layers(config, model, matches).items() if is_linear(base, model)
    }
    given = dict(config.support_pattern)
    if given:
        missing = sorted(set(layers) - set(given))
        if missing:
            raise ValueError(
                f"support_pattern was made for another model: it has no entry for {missing[:3]} ({len(missing)} "
                "modules). Set support_pattern={} to share the budget out anew."
            )
        if not config.structures:
            layers = {name: base for name, base in layers.items() if given[name]}
    grids = _grids(config, layers)
    chosen = {}
    if config.data_driven and not given:
        _check_grids(config, grids)
    if config.structures and not config.data_driven and not (given and config.inference_mode):
        chosen = choose_structures(config, grids, model, lambda n: _score_chunks(config, n, layers[n], grids[n], model))
    if given:
        for name, grid in grids.items():
            _check_given_count(given[name], name, grid)
        # Compaction may have left other counts than the structures give; a file is about to fill those.
        return given, {name: units for name, units in chosen.items() if units.numel() == given[name]}
    counts = {name: units.numel() for name, units in chosen.items()}
    if config.structures and config.data_driven:
        counts = structure_counts(config, grids, model)
    rest = {name: grid for name, grid in grids.items() if name not in counts}
    budgets = (config.density, config.num_entries, config.units_per_module, config.budget_rank, config.density_pattern)
    if rest and any(bool(budget) for budget in budgets):
        counts |= _counts(config, layers, rest, model)
    if config.sizes_from_data:
        return counts, chosen  # of no meaning yet: what data or a file says is written then
    if config.allocation != "uniform" or config.num_entries is not None or config.structures:
        config.support_pattern = {name: counts.get(name, 0) for name in grids}
    return counts, chosen


def _grids(config: SparseLoraConfig, layers: dict[str, nn.Module]) -> dict[str, UnitGrid]:
    grids = {}
    for name, base in layers.items():
        cols, rows = _get_in_out_features(base)
        try:
            grids[name] = UnitGrid(rows, cols, config.granularity_of(name), config.block_size)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
    return grids


def _check_grids(config: SparseLoraConfig, grids: dict[str, UnitGrid]) -> None:
    score = config.criterion
    for name, grid in grids.items():
        if isinstance(score, DataCriterion):
            score.check_grid(grid, name)


def unit_capacities(config: SparseLoraConfig, counts: dict[str, int], model: nn.Module, matches) -> dict[str, int]:
    """Units allocated for every targeted module: its count, and room beyond it where a rule asks for it.

    Room is `floor(Rule.extra_capacity * count)`, at most what the weight has left. Written to
    `config.capacity_pattern`, so that a compacted adapter, whose pattern is empty again, keeps its size.
    """
    share = 0.0 if config.training_finished else max((rule.extra_capacity for rule in config.rules), default=0.0)
    if share and not config.capacity_pattern:
        for wrapped_name, base in target_layers(config, model, matches).items():
            if counts.get(name := plain_name(wrapped_name)):
                cols, rows = _get_in_out_features(base)
                units = UnitGrid(rows, cols, config.granularity_of(name), config.block_size).num_units
                config.capacity_pattern[name] = min(units, counts[name] + int(share * counts[name]))
    return {name: max(config.capacity_pattern.get(name, 0), count) for name, count in counts.items()}


def _check_given_count(count: int, name: str, grid: UnitGrid) -> None:
    if not 0 <= count <= grid.num_units:
        raise ValueError(
            f"support_pattern gives '{name}' {count} units, and its {grid.rows}x{grid.cols} weight has "
            f"{grid.num_units} of granularity '{grid.granularity}'. Was it made for another model? Set "
            "support_pattern={} to share the budget out anew."
        )


def is_linear(base: nn.Module, model: nn.Module) -> bool:
    backend = resolve_quantization_backend(base, **get_quantization_kwargs(model))
    return backend is not None or isinstance(base, (nn.Linear, Conv1D))


def _counts(
    config: SparseLoraConfig, layers: dict[str, nn.Module], grids: dict[str, UnitGrid], model: nn.Module
) -> dict[str, int]:
    if config.units_per_module is not None:
        for name, grid in grids.items():
            if config.units_per_module > grid.num_units:
                raise ValueError(
                    f"units_per_module={config.units_per_module} is more than the {grid.num_units} {grid.granularity} "
                    f"units of '{name}' ({grid.rows}x{grid.cols}). Lower it, or leave the module out."
                )
        return dict.fromkeys(grids, config.units_per_module)
    entries = sum(grid.rows * grid.cols for grid in grids.values())
    if config.num_entries is not None and config.num_entries > entries:
        raise ValueError(
            f"num_entries={config.num_entries} is more than the {entries} entries of the targeted weights. Lower it, "
            "or target more modules."
        )
    if config.allocation == "tensors":
        return whole_tensor_counts(config, grids)
    if config.budget_rank is not None:
        return counts_from_rank(grids, config.budget_rank)
    density = config.density if config.num_entries is None else config.num_entries / entries
    if config.sizes_from_data and not config.structures:
        if not isinstance(config.criterion, Given):
            _check_global_budget(density, grids)
        return {name: max(1, int(density * grid.num_units)) for name, grid in grids.items()}
    if config.density_pattern:
        return _counts_by_module(config, grids)
    if config.allocation == "proportional":
        budget = config.num_entries or UnitGrid(1, entries).count_for_density(density)
        return proportional_counts(grids, budget, config.seed)
    if config.allocation == "erdos_renyi":
        return erdos_renyi_counts(grids, density, config.seed)
    if config.allocation == "threshold":
        return {name: _below_threshold(config, name, layers[name], grids[name], model) for name in grids}
    if config.allocation == "global":
        _check_global_budget(density, grids)
        chunks = {name: _score_chunks(config, name, layers[name], grids[name], model) for name in grids}
        # Rounded as torch.nn.utils.prune does, so that what one-shot pruning removes is what this chooses.
        total = round(density * sum(grid.num_units for grid in grids.values()))
        return global_counts(chunks, grids, total, config.seed)
    return (
        uniform_counts(grids, density) if config.num_entries is None else counts_from_total(grids, config.num_entries)
    )


def _check_global_budget(density: float, grids: dict[str, UnitGrid]) -> None:
    units = sum(grid.num_units for grid in grids.values())
    if int(density * units) < len(grids):
        raise ValueError(
            f"density={density:.2e} leaves {int(density * units)} of the {units} units, and each of the {len(grids)} "
            f"targeted modules keeps at least one. Raise density to at least {len(grids) / units:.1e}, or target fewer "
            "modules."
        )


def _counts_by_module(config: SparseLoraConfig, grids: dict[str, UnitGrid]) -> dict[str, int]:
    keys = {name: pattern_key(config.density_pattern, name, "density_pattern") for name in grids}
    unused = sorted(set(config.density_pattern) - set(keys.values()))
    if unused:
        raise ValueError(
            f"density_pattern names {unused}, and no targeted module matches. It takes module names or regexes of: "
            f"{', '.join(list(grids)[:3])}, ... Correct the name, or add the module to target_modules."
        )
    densities = {name: config.density_pattern.get(keys[name], config.density) for name in grids}
    return {name: grids[name].count_for_density(share, name) for name, share in densities.items() if share}


def _below_threshold(config: SparseLoraConfig, name: str, base: nn.Module, grid: UnitGrid, model: nn.Module) -> int:
    threshold = next(rule.threshold for rule in config.rules if isinstance(rule, Freeze))
    chunks = _score_chunks(config, name, base, grid, model)()
    count = sum(int((chunk > -threshold).sum()) for chunk in chunks)
    if count == 0:
        raise ValueError(
            f"Freeze.threshold={threshold} leaves no entry in '{name}' ({grid.rows}x{grid.cols}): none is smaller. "
            "Raise it, use density instead, or leave the module out of target_modules."
        )
    return count


def _score_chunks(config: SparseLoraConfig, name: str, base: nn.Module, grid: UnitGrid, model: nn.Module):
    """Score chunks of one module, computed anew at each pass so that one dense weight is alive at a time."""

    def chunks():
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(model))
        weight = base.weight.data if backend is None else backend.get_base_weight(base)
        weight = weight.t() if backend is None and isinstance(base, Conv1D) else weight
        generator = torch.Generator(device=weight.device).manual_seed(stream_seed(config.seed, name))
        return config.criterion(weight, grid, generator)()

    return chunks
