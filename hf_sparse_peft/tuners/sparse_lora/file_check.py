"""What the tensors of one module in a file say of its sizes, held against the adapter's config."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import torch

from ...sparsity import GRANULARITIES, HEADER_BYTES, Budget, ByModule, Targets, UnitGrid, decode_support
from ...sparsity.codec import FORMAT_VERSION
from ..shared.file_check import CONFIG_FILE, tensor_key
from ..shared.module_patterns import pattern_key
from ..shared.tensor_checks import side
from .config import SparseLoraConfig
from .plan import ModuleSizes

# As the codec's module docstring lays it out; granularity and block size of a file are known before any grid is.
_HEADER = struct.Struct("<2sBBIIIII")
Tensors = Mapping[str, torch.Tensor]


def read_sizes(config: SparseLoraConfig, name: str, held: Tensors) -> tuple[int, int, ModuleSizes]:
    """Rows and columns of the weight of the module `name`, and the sizes of both halves.

    Raises:
        ValueError: a half that the config asks for is missing, the halves belong to weights of two sizes, or a size is
            not the config's; names the tensor.
    """
    rank = config.rank_of(name)
    factors = _weight_of_factors(name, held, rank) if rank or "sparse_lora_A" in held else None
    due = config.has_support and _has_units(config, name)
    if not (due or {"sparse_lora_values", "sparse_lora_support"} & set(held)):
        if factors is None:
            raise ValueError(f"'{tensor_key(name, 'sparse_lora_A')}' is missing: the config has a low-rank half.")
        return *factors, ModuleSizes(None, 0, 0, rank)
    for kind in ("sparse_lora_values", "sparse_lora_support"):
        if kind not in held:
            raise ValueError(f"'{tensor_key(name, kind)}' is missing: the config has a sparse half.")
    grid = _grid_of(held["sparse_lora_support"], config, name)
    if factors not in (None, (grid.rows, grid.cols)):
        raise ValueError(
            f"'{tensor_key(name, 'sparse_lora_A')}' and '{tensor_key(name, 'sparse_lora_B')}' belong to a weight of "
            f"{factors[0]}x{factors[1]}, '{tensor_key(name, 'sparse_lora_support')}' beside them to one of "
            f"{grid.rows}x{grid.cols}."
        )
    capacity = _capacity_of(name, held["sparse_lora_values"], grid, config)
    return grid.rows, grid.cols, ModuleSizes(grid, capacity, capacity, rank)


def _weight_of_factors(name: str, held: Tensors, rank: int) -> tuple[int, int]:
    """Rows and columns of the weight that the factors belong to."""
    A, B = tensor_key(name, "sparse_lora_A"), tensor_key(name, "sparse_lora_B")
    cols, rows = side(held, "sparse_lora_A", 1, 2, A), side(held, "sparse_lora_B", 0, 2, B)
    found = held["sparse_lora_A"].shape[0]
    if found != rank:
        raise ValueError(
            f"'{A}' has rank {found}, and {CONFIG_FILE} gives the module rank {rank}. Use the config saved with the "
            "file."
        )
    return rows, cols


def _capacity_of(name: str, values: torch.Tensor, grid: UnitGrid, config: SparseLoraConfig) -> int:
    key, capacity = tensor_key(name, "sparse_lora_values"), values.shape[0] if values.ndim else 0
    if capacity > grid.num_units:
        raise ValueError(
            f"'{key}' has {capacity} units where a weight of {grid.rows}x{grid.cols} has {grid.num_units}."
        )
    due = config.sizes[name][1] if name in config.sizes else None
    budget = config.support_budget
    if not config.sizes and not config.structures and isinstance(budget, Budget) and budget.follows_from_module:
        due = budget.counts(Targets({name: grid}, find=_find)).get(name, 0)
    if due is not None and due != capacity:
        raise ValueError(
            f"'{key}' has room for {capacity} units, and {CONFIG_FILE} makes it {due}. Use the config saved with the "
            "file."
        )
    return capacity


def _has_units(config: SparseLoraConfig, name: str) -> bool:
    if name in config.sizes:
        return bool(config.sizes[name][1])
    return not isinstance(config.budget, ByModule) or config.budget.density_of(name, _find) > 0


def _find(patterns: Mapping[str, Any], name: str) -> str | None:
    return pattern_key(patterns, name, "budget")


def _grid_of(codes: torch.Tensor, config: SparseLoraConfig, name: str) -> UnitGrid:
    key, granularity_due = tensor_key(name, "sparse_lora_support"), config.granularity_of(name)
    readable = codes.dtype == torch.uint8 and codes.ndim == 1 and codes.numel() >= HEADER_BYTES
    header = bytes(codes[:HEADER_BYTES].tolist()) if readable else b""
    if not readable or header[:2] != b"SU" or header[2] != FORMAT_VERSION:
        decode_support(codes, UnitGrid(1, 1), 0, key)  # says what is wrong
    _, _, granularity, block_size, _, rows, cols, _ = _HEADER.unpack(header)
    kind = GRANULARITIES[granularity] if granularity < len(GRANULARITIES) else f"code {granularity}"
    if kind != granularity_due or (kind == "block" and block_size != config.block_size):
        raise ValueError(
            f"'{key}' has granularity '{kind}'{f' of {block_size}' if kind == 'block' else ''}, and {CONFIG_FILE} says "
            f"'{granularity_due}' with block_size={config.block_size}. Use the config saved with the file."
        )
    try:
        return UnitGrid(rows, cols, kind, config.block_size)
    except ValueError as error:
        raise ValueError(f"'{key}' has a damaged header: {error}") from error
