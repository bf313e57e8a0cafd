"""Several adapters combined into a new one: sparse halves add on the union of their supports, low-rank halves combine
as upstream's LoRA does."""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import TYPE_CHECKING

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties

from ...sparsity import UnitGrid
from ..shared.heads import assign_heads, check_no_biases, head_owners
from .config import SCHEDULES, SparseLoraConfig, exact_pattern
from .factors import merged_factors
from .layer import SparseLoraLayer
from .operands import as_entries

if TYPE_CHECKING:
    from .model import SparseLoraModel

_BASIC = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = ("svd", "cat", *_BASIC, *(f"{name}_svd" for name in _BASIC if name != "linear"))


@torch.no_grad()
def add_weighted_adapter(
    model: SparseLoraModel,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    modules_to_save_from: str | None = None,
) -> None:
    r"""Add the adapter `adapter_name` that combines `adapters` with `weights`.

    Sparse halves: `svd`, `cat` and `linear` give :math:`\sum_i w_i S_i`, exactly; `ties`, `dare_*` and
    `magnitude_prune` work on the values over the united support. Low-rank halves: `cat` is exact (ranks add up), `svd`
    and `*_svd` fit rank `svd_rank` (default: the largest) to the combined update, the rest combine the factors one by
    one as upstream's `LoraModel.add_weighted_adapter` does.

    Heads (`modules_to_save`) are whole modules and are copied as they are, whatever the weights: those of the one
    adapter that has them, equal ones, or those of the adapter `modules_to_save_from`.

    Raises:
        ValueError: an unknown adapter or type, a name that is taken, weights of another number, a missing `density`,
            factors of different ranks where the type needs equal ones, different heads without
            `modules_to_save_from`, or an adapter that trains biases.
    """
    _check(model, adapters, weights, adapter_name, combination_type, density)
    check_no_biases(model.peft_config, adapters, "a combination has none of its own")
    owners = head_owners(model.model, adapters, modules_to_save_from)
    base_type = combination_type.removesuffix("_svd") if combination_type != "svd" else "linear"

    def merge(tensors: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
        scale = torch.tensor(coefficients, device=tensors[0].device, dtype=tensors[0].dtype)
        if base_type in ("linear", "cat"):
            return task_arithmetic(tensors, scale)
        if base_type == "magnitude_prune":
            return magnitude_prune(tensors, scale, density)
        if base_type == "dare_linear":
            return dare_linear(tensors, scale, density)
        return (ties if base_type == "ties" else dare_ties)(tensors, scale, density, majority_sign_method)

    layers = [m for m in model.model.modules() if isinstance(m, SparseLoraLayer)]
    layers = [layer for layer in layers if any(layer.holds(name) for name in adapters)]
    granular = _granularities(layers, adapters)
    results = {}
    for layer in layers:
        as_entry = granular.get(layer.module_name) == "entry"
        sparse = _combined_support(layer, adapters, weights, merge, as_entry)
        low_rank = _combined_factors(layer, adapters, weights, combination_type, merge, svd_rank)
        results[layer.module_name] = (sparse, low_rank)
    config = _new_config(model.peft_config[adapters[0]], results, granular)
    sizes = {g.block_size for layer in layers for g in _grids(layer, adapters) if g.granularity == "block"}
    config.block_size = sizes.pop() if len(sizes) == 1 else config.block_size
    heads = (model.peft_config[owner].modules_to_save or () for owner in set(owners.values()))
    config.modules_to_save = sorted({name for names in heads for name in names}) or None
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except Exception:
        del model.peft_config[adapter_name]
        raise
    for layer in layers:
        _fill(layer, adapter_name, *results[layer.module_name])
    assign_heads(model.model, owners, adapter_name)


def _check(model, adapters, weights, adapter_name, combination_type, density) -> None:
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"combination_type={combination_type!r} is unknown; choose one of {list(COMBINATION_TYPES)}.")
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown or not adapters:
        raise ValueError(f"adapters={adapters}: {unknown or 'none given'}; this model has {sorted(model.peft_config)}.")
    if len(weights) != len(adapters):
        raise ValueError(f"weights has {len(weights)} numbers for {len(adapters)} adapters; give one each.")
    if adapter_name in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is taken; choose another or delete that adapter first.")
    if density is None and not combination_type.startswith(("svd", "cat", "linear")):
        raise ValueError(
            f"combination_type={combination_type!r} needs density, the share of values it keeps, e.g. 0.5."
        )


def _grids(layer: SparseLoraLayer, adapters: list[str]) -> list[UnitGrid]:
    return [layer.sparse_lora_grid[name] for name in adapters if name in layer.sparse_lora_grid]


def _granularities(layers: list[SparseLoraLayer], adapters: list[str]) -> dict[str, str]:
    """What a unit of the combination is, by module name: the adapters' own kind where they agree, else an entry."""
    # One config has one block size: blocks of several sizes, even in different modules, become entries.
    sizes = {grid.block_size for layer in layers for grid in _grids(layer, adapters) if grid.granularity == "block"}
    found = {}
    for layer in layers:
        kinds = {grid.granularity for grid in _grids(layer, adapters)}
        if kinds:
            mixed = len(kinds) > 1 or (kinds == {"block"} and len(sizes) > 1)
            found[layer.module_name] = "entry" if mixed else kinds.pop()
    return found


def _combined_support(layer, adapters, weights, merge, as_entry):
    parts, coefficients = [], []
    for name, weight in zip(adapters, weights, strict=True):
        if name in layer.sparse_lora_values:
            units = layer.units(name)
            values = layer.living_values(name)
            if as_entry:
                values, units = as_entries(values, units, layer.sparse_lora_grid[name])
            parts.append((values.float(), units))
            coefficients.append(weight)
    if not parts:
        return None
    united, owner = torch.unique(torch.cat([units for _, units in parts]), return_inverse=True)
    owners = owner.split([units.numel() for _, units in parts])
    aligned = [
        values.new_zeros(united.numel(), *values.shape[1:]).index_copy_(0, at, values)
        for (values, _), at in zip(parts, owners, strict=True)
    ]
    return merge(aligned, coefficients), united


def _combined_factors(layer, adapters, weights, combination_type, merge, svd_rank):
    pairs = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.sparse_lora_A]
    if not pairs:
        return None
    factors = [_folded(layer, name) for name, _ in pairs]  # A, B without scaling
    scaled = [weight * layer.sparse_lora_scaling[name] for name, weight in pairs]
    if combination_type == "cat":
        A = torch.cat([A * scale for (A, _), scale in zip(factors, scaled, strict=True)])
        return A, torch.cat([B for _, B in factors], dim=1)
    if combination_type.endswith("svd"):
        coefficients = [weight for _, weight in pairs]
        deltas = [layer.sparse_lora_scaling[n] * B @ A for (A, B), (n, _) in zip(factors, pairs, strict=True)]
        rank = svd_rank or max(A.shape[0] for A, _ in factors)
        U, S, Vh = torch.linalg.svd(merge(deltas, coefficients), full_matrices=False)
        return Vh[:rank].contiguous(), (U[:, :rank] * S[:rank]).contiguous()
    ranks = {A.shape[0] for A, _ in factors}
    if len(ranks) > 1:
        raise ValueError(
            f"combination_type={combination_type!r} combines factors of one rank, and '{layer.module_name}' has "
            f"{sorted(ranks)}. Use combination_type='cat' (exact) or 'svd'."
        )
    root = [math.sqrt(abs(scale)) for scale in scaled]
    signed = [value if scale >= 0 else -value for value, scale in zip(root, scaled, strict=True)]
    return merge([A for A, _ in factors], signed), merge([B for _, B in factors], root)


def _folded(layer: SparseLoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    A, B = (factor.float() for factor in merged_factors(layer, name))
    return A, B * layer.sparse_lora_gate[name].data if name in layer.sparse_lora_gate else B


def _new_config(first: SparseLoraConfig, results: dict, granular: dict[str, str]) -> SparseLoraConfig:
    config = copy.deepcopy(first)
    for name in SCHEDULES:  # masked factors are folded, like the scaling
        setattr(config, name, None)
    config.structures, config.units_per_module, config.scale_support, config.support_init = [], None, False, "zeros"
    config.use_rslora = False  # scaling is folded into the factors: alpha = r makes it 1
    config.criterion, config.criterion_options = "random", {}
    config.granularity = Counter(granular.values()).most_common(1)[0][0] if granular else "entry"
    config.granularity_pattern = exact_pattern({n: kind for n, kind in granular.items() if kind != config.granularity})
    config.support_pattern = {name: 0 if sparse is None else sparse[1].numel() for name, (sparse, _) in results.items()}
    config.capacity_pattern = {}
    if not any(config.support_pattern.values()):
        config.support_pattern, config.density, config.num_entries = {}, 0.0, None
        config.budget_rank = None
    ranks = {name: 0 if low_rank is None else low_rank[0].shape[0] for name, (_, low_rank) in results.items()}
    config.rank_pattern = exact_pattern(ranks)
    config.alpha_pattern = exact_pattern({name: float(max(rank, 1)) for name, rank in ranks.items()})
    config.r = max(ranks.values())
    config.target_modules = set(results)
    config.inference_mode = False
    return config


def _fill(layer: SparseLoraLayer, adapter_name: str, sparse, low_rank) -> None:
    if sparse is not None:
        layer.write_support(adapter_name, sparse[1])
        layer.sparse_lora_values[adapter_name].data.copy_(sparse[0])
    if low_rank is not None:
        layer.sparse_lora_A[adapter_name].data.copy_(low_rank[0])
        layer.sparse_lora_B[adapter_name].data.copy_(low_rank[1])
