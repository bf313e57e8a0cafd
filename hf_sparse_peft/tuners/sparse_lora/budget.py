"""How many units each targeted module gets, decided once for the whole model at injection."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...sparsity import (
    UnitGrid,
    counts_from_rank,
    counts_from_total,
    erdos_renyi_counts,
    global_counts,
    make_score,
    stream_seed,
    uniform_counts,
)
from .config import SparseLoraConfig


def target_layers(config: SparseLoraConfig, model: nn.Module, matches) -> dict[str, nn.Module]:
    """Base layers of the modules that `config` targets in `model`, by module name, in model order."""
    config = _maybe_include_all_linear_layers(config, model)
    wrapped = [name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    found = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(prefix) for prefix in wrapped)
        if name and not inside and matches(config, name):
            found[name] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return found


def unit_counts(config: SparseLoraConfig, model: nn.Module, matches) -> dict[str, int]:
    """Units of every targeted module's support, by module name; checked for the whole model before a layer changes.

    Counts that follow from more than the module alone (`num_entries`, an allocation over the model) are written to
    `config.support_pattern`, so that shapes follow from the config when the adapter is loaded or resumed.

    Raises:
        ValueError: the budget leaves a module without a unit or exceeds the weights, blocks do not fit, or
            `support_pattern` was made for another model.
    """
    if not config.has_support:
        return {}
    # Whatever else matched is refused by name when its layer is created.
    layers = {n: base for n, base in target_layers(config, model, matches).items() if _is_linear(base, model)}
    if config.support_pattern:
        missing = sorted(set(layers) - set(config.support_pattern))
        if missing:
            raise ValueError(
                f"support_pattern was made for another model: it has no entry for {missing[:3]} ({len(missing)} "
                "modules). Set support_pattern={} to share the budget out anew, or use a fresh config for each model."
            )
        layers = {name: base for name, base in layers.items() if config.support_pattern[name]}
    grids = {}
    for name, base in layers.items():
        cols, rows = _get_in_out_features(base)
        try:
            grids[name] = UnitGrid(rows, cols, config.granularity, config.block_size)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
    if config.support_pattern:
        for name, grid in grids.items():
            _check_given_count(config.support_pattern[name], name, grid)
        return dict(config.support_pattern)
    counts = _counts(config, layers, grids, model) if grids else {}
    if config.allocation != "uniform" or config.num_entries is not None:
        config.support_pattern = dict(counts)
    return counts


def unit_capacities(config: SparseLoraConfig, counts: dict[str, int], model: nn.Module, matches) -> dict[str, int]:
    """Units allocated for every targeted module: its count, and room for retired units where `regrowth` asks for it.

    Room is `floor(retired_share * count)`, at most what the weight has left. Written to `config.capacity_pattern`, so
    that a compacted adapter, whose pattern is empty again, keeps its size.
    """
    share = config.regrowth.retired_share if config.regrowth and not config.training_finished else 0.0
    if share and not config.capacity_pattern:
        for name, base in target_layers(config, model, matches).items():
            if counts.get(name):
                cols, rows = _get_in_out_features(base)
                units = UnitGrid(rows, cols, config.granularity, config.block_size).num_units
                config.capacity_pattern[name] = min(units, counts[name] + int(share * counts[name]))
    return {name: max(config.capacity_pattern.get(name, 0), count) for name, count in counts.items()}


def _check_given_count(count: int, name: str, grid: UnitGrid) -> None:
    if not 0 < count <= grid.num_units:
        raise ValueError(
            f"support_pattern gives '{name}' {count} units, and its {grid.rows}x{grid.cols} weight has "
            f"{grid.num_units} of granularity '{grid.granularity}'. Was it made for another model? Set "
            "support_pattern={} to share the budget out anew."
        )


def _is_linear(base: nn.Module, model: nn.Module) -> bool:
    backend = resolve_quantization_backend(base, **get_quantization_kwargs(model))
    return backend is not None or isinstance(base, (nn.Linear, Conv1D))


def _counts(
    config: SparseLoraConfig, layers: dict[str, nn.Module], grids: dict[str, UnitGrid], model: nn.Module
) -> dict[str, int]:
    entries = sum(grid.rows * grid.cols for grid in grids.values())
    if config.num_entries is not None and config.num_entries > entries:
        raise ValueError(
            f"num_entries={config.num_entries} is more than the {entries} entries of the targeted weights. Lower it, "
            "or target more modules."
        )
    if config.budget_rank is not None:
        return counts_from_rank(grids, config.budget_rank)
    density = config.density if config.num_entries is None else config.num_entries / entries
    if config.allocation == "erdos_renyi":
        return erdos_renyi_counts(grids, density)
    if config.allocation == "global":
        chunks = {name: _score_chunks(config, name, layers[name], grids[name], model) for name in grids}
        total = int(density * sum(grid.num_units for grid in grids.values()))
        return global_counts(chunks, grids, total)
    return (
        uniform_counts(grids, density) if config.num_entries is None else counts_from_total(grids, config.num_entries)
    )


def _score_chunks(config: SparseLoraConfig, name: str, base: nn.Module, grid: UnitGrid, model: nn.Module):
    """Score chunks of one module, computed anew at each pass so that one dense weight is alive at a time."""

    def chunks():
        backend = resolve_quantization_backend(base, **get_quantization_kwargs(model))
        weight = base.weight.data if backend is None else backend.get_base_weight(base)
        weight = weight.t() if backend is None and isinstance(base, Conv1D) else weight
        generator = torch.Generator(device=weight.device).manual_seed(stream_seed(config.seed, name))
        return make_score(config.criterion, **config.criterion_options)(weight, grid, generator)()

    return chunks
