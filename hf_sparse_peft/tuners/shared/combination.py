"""Several adapters combined into a new one: supports add on their union, low-rank pieces combine as upstream's LoRA
does. Reads pieces only; the tuner says which config holds the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from ...sparsity import UnitGrid
from .heads import assign_heads, check_no_biases, head_owners
from .layer import AdapterLayer, adapter_layers
from .pieces import Entries, LowRank, Piece, Subgrid

_BASIC = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATION_TYPES = ("svd", "cat", *_BASIC, *(f"{name}_svd" for name in _BASIC if name != "linear"))


@torch.no_grad()
def add_weighted_adapter(
    model: BaseTuner,
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

    Supports: `svd`, `cat` and `linear` give :math:`\sum_i w_i S_i`, exactly; `ties`, `dare_*` and `magnitude_prune`
    work on the values over the united support. Low-rank pieces: `cat` is exact (ranks add up), `svd` and `*_svd` fit
    rank `svd_rank` (default: the largest) to the combined update, all others combine the factors one by one as
    upstream's `LoraModel.add_weighted_adapter` does.

    Heads (`modules_to_save`) are whole modules and are copied as they are, whatever the weights: those of the one
    adapter that has them, equal ones, or those of the adapter `modules_to_save_from`.

    Raises:
        ValueError: an unknown adapter or type, a name that is taken, weights of another number, a missing `density`,
            factors of different ranks where the type needs equal ones, different heads without
            `modules_to_save_from`, an adapter that trains biases, or a tuner that cannot hold a sum of its updates
            (kernel adapters: a sum of kernels is no kernel). The model is as it was then.
    """
    _check(model, adapters, weights, adapter_name, combination_type, density)
    check_no_biases(model.peft_config, adapters, "a combination has none of its own")
    owners = head_owners(model.model, adapters, modules_to_save_from)
    layers = [layer for layer in adapter_layers(model.model) if any(layer.holds(name) for name in adapters)]
    merge = _merge_function(combination_type, density, majority_sign_method)
    combined = _combined_pieces(layers, adapters, weights, combination_type, merge, svd_rank)
    config = model.config_of_pieces(model.peft_config[adapters[0]], combined)
    config.target_modules, config.exclude_modules = set(combined), None
    config.layers_to_transform = config.layers_pattern = None
    heads = (model.peft_config[owner].modules_to_save or () for owner in set(owners.values()))
    config.modules_to_save = sorted({name for names in heads for name in names}) or None
    config.inference_mode = False
    model.peft_config[adapter_name] = config
    try:
        model.inject_adapter(model.model, adapter_name)
    except Exception:
        del model.peft_config[adapter_name]
        raise
    for layer in layers:
        layer.write_pieces(adapter_name, combined[layer.module_name])
    assign_heads(model.model, owners, adapter_name)


def no_combination(peft_type: str) -> ValueError:
    """The error of a tuner whose updates do not add up to one of its updates."""
    return ValueError(
        f"A weighted sum of {peft_type} updates is no {peft_type} update, and a model holds adapters of one type, so "
        "add_weighted_adapter has no form for it. hub.merge_to_dense(model, adapter_names=[...], weights=[...]) sums "
        "them exactly in a dense model; hub.export_lora(model, path, adapter_name, rank=...) makes each a LoRA, which "
        "peft combines."
    )


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
            f"combination_type={combination_type!r} needs density, the fraction of values it keeps, e.g. 0.5."
        )


_Merge = Callable[[list[Tensor], list[float]], Tensor]


def _merge_function(combination_type: str, density: float | None, majority_sign_method: str) -> _Merge:
    """Upstream's function for a list of equally shaped tensors and their weights."""
    kind = "linear" if combination_type in ("svd", "cat") else combination_type.removesuffix("_svd")

    def merge(tensors: list[Tensor], weights: list[float]) -> Tensor:
        scale = torch.tensor(weights, device=tensors[0].device, dtype=tensors[0].dtype)
        if kind == "linear":
            return task_arithmetic(tensors, scale)
        if kind == "magnitude_prune":
            return magnitude_prune(tensors, scale, density)
        if kind == "dare_linear":
            return dare_linear(tensors, scale, density)
        return (ties if kind == "ties" else dare_ties)(tensors, scale, density, majority_sign_method)

    return merge


@dataclass(frozen=True)
class _Weighted:
    """One adapter's pieces in one layer, at most one of each kind."""

    weight: float
    low_rank: LowRank | None
    entries: Entries | None


def _combined_pieces(
    layers: list[AdapterLayer],
    adapters: list[str],
    weights: list[float],
    combination_type: str,
    merge: _Merge,
    svd_rank: int | None,
) -> dict[str, list[Piece]]:
    """Pieces of the combination, by module name: at most one `LowRank` and one `Entries` each."""
    operands = {
        layer.module_name: [_read(layer, name, weight) for name, weight in zip(adapters, weights, strict=True)]
        for layer in layers
    }
    return _combined(operands, combination_type, merge, svd_rank)


def weighted_pieces(terms: Mapping[str, Sequence[tuple[float, Sequence[Piece]]]]) -> dict[str, list[Piece]]:
    """The weighted sum of pieces, by module name: supports on their union, ranks side by side, exactly; at most one
    `LowRank` of scale 1 and one `Entries` each.

    Raises:
        ValueError: a module has pieces of other kinds than factors, entries and subgrids, or two of one kind.
    """

    def refused() -> ValueError:
        return ValueError("A weighted sum of these pieces has no exact form of factors and entries.")

    operands = {name: [_weighted(pieces, w, refused) for w, pieces in found] for name, found in terms.items()}
    return _combined(operands, "cat", _merge_function("linear", None, "total"), None)


def _combined(
    operands: dict[str, list[_Weighted]], combination_type: str, merge: _Merge, svd_rank: int | None
) -> dict[str, list[Piece]]:
    grids = _grids(operands)
    combined = {}
    for name, parts in operands.items():
        low_rank = _combined_factors(name, [p for p in parts if p.low_rank], combination_type, merge, svd_rank)
        entries = _combined_entries([p for p in parts if p.entries], grids[name], merge) if name in grids else None
        combined[name] = [piece for piece in (low_rank, entries) if piece is not None]
    return combined


def _read(layer: AdapterLayer, adapter_name: str, weight: float) -> _Weighted:
    kind = layer.adapter_configs[adapter_name].peft_type.value if layer.holds(adapter_name) else ""
    return _weighted(layer.pieces(adapter_name), weight, lambda: no_combination(kind))


def _weighted(pieces: Sequence[Piece], weight: float, refused: Callable[[], ValueError]) -> _Weighted:
    found: dict[type, Piece] = {}
    for piece in pieces:
        piece = piece.as_entries() if isinstance(piece, Subgrid) else piece
        if type(piece) not in (LowRank, Entries) or type(piece) in found:
            raise refused()
        found[type(piece)] = piece
    return _Weighted(weight, found.get(LowRank), found.get(Entries))


# Supports


def _grids(operands: dict[str, list[_Weighted]]) -> dict[str, UnitGrid]:
    """How each module's combined support is cut: as the adapters' own where they agree, else into entries."""
    found = {name: {p.entries.grid for p in parts if p.entries} for name, parts in operands.items()}
    # A config has one block size and one number of diagonal blocks: several, even in different modules, become entries.
    cuts = {(grid.granularity, grid.cut_size) for grids in found.values() for grid in grids}
    result = {}
    for name, grids in found.items():
        if not grids:
            continue
        kinds, first = {grid.granularity for grid in grids}, next(iter(grids))
        mixed = len(kinds) > 1 or sum(granularity in kinds for granularity, _ in cuts) > 1
        result[name] = UnitGrid(first.rows, first.cols, "entry") if mixed else first
    return result


def _combined_entries(parts: Sequence[_Weighted], grid: UnitGrid, merge: _Merge) -> Entries:
    aligned, supports = [], []
    for part in parts:
        units, values = part.entries.units, part.entries.values
        if grid.granularity == "entry" and part.entries.grid.granularity != "entry":
            units, values = part.entries.grid.as_entries(units, values)
        supports.append((units, values.float()))
    united, owner = torch.unique(torch.cat([units for units, _ in supports]), return_inverse=True)
    owners = owner.split([units.numel() for units, _ in supports])
    for (_, values), at in zip(supports, owners, strict=True):
        aligned.append(values.new_zeros(united.numel(), *values.shape[1:]).index_copy_(0, at, values))
    return Entries(united, merge(aligned, [part.weight for part in parts]), grid)


# Low-rank pieces


def _combined_factors(
    module_name: str, parts: Sequence[_Weighted], combination_type: str, merge: _Merge, svd_rank: int | None
) -> LowRank | None:
    if not parts:
        return None
    pieces, weights = [part.low_rank for part in parts], [part.weight for part in parts]
    factors = [_folded(piece) for piece in pieces]
    scaled = [weight * piece.scale for piece, weight in zip(pieces, weights, strict=True)]
    if combination_type == "cat":
        A = torch.cat([A * scale for (A, _), scale in zip(factors, scaled, strict=True)])
        return LowRank(torch.cat([B for _, B in factors], dim=1), A)
    if combination_type.endswith("svd"):
        deltas = [piece.scale * B @ A for (A, B), piece in zip(factors, pieces, strict=True)]
        rank = svd_rank or max(A.shape[0] for A, _ in factors)
        U, S, Vh = torch.linalg.svd(merge(deltas, weights), full_matrices=False)
        return LowRank((U[:, :rank] * S[:rank]).contiguous(), Vh[:rank].contiguous())
    ranks = {A.shape[0] for A, _ in factors}
    if len(ranks) > 1:
        raise ValueError(
            f"combination_type={combination_type!r} combines factors of one rank, and '{module_name}' has "
            f"{sorted(ranks)}. Use combination_type='cat' (exact) or 'svd'."
        )
    root = [math.sqrt(abs(scale)) for scale in scaled]
    signed = [value if scale >= 0 else -value for value, scale in zip(root, scaled, strict=True)]
    return LowRank(merge([B for _, B in factors], root), merge([A for A, _ in factors], signed))


def _folded(piece: LowRank) -> tuple[Tensor, Tensor]:
    """A and B in fp32, the gate multiplied into B; the scale is left out."""
    A, B = piece.A.float(), piece.B.float()
    return A, B if piece.gate is None else B * piece.gate.data
