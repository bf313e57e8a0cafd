"""Checking the tensors of one module under a sparse + low-rank adapter, by the adapter's config."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...sparsity import (
    GRANULARITIES,
    HEADER_BYTES,
    UnitGrid,
    counts_from_rank,
    decode_support,
    uniform_counts,
)
from ...sparsity.codec import FORMAT_VERSION
from ..shared.file_check import CONFIG_FILE, tensor_key
from .config import SparseLoraConfig

# As the codec's module docstring lays it out; granularity and block size of a file are known before any grid is.
_HEADER = struct.Struct("<2sBBIIIII")


@dataclass(frozen=True)
class ModuleSizes:
    """What the tensors of one module say of it."""

    rows: int
    cols: int
    grid: UnitGrid | None
    """Units of the support; None without one."""
    living: int
    """Living units."""
    capacity: int
    """Units that there is room for."""
    rank: int
    """Components that there is room for."""


def check_sparse_module(
    name: str, held: dict[str, torch.Tensor], config: SparseLoraConfig, file: Path | str
) -> ModuleSizes:
    """Check partners, shapes, dtypes, the support's codes and counts of one module against each other and `config`.

    Raises:
        ValueError: names the file and the tensor.
    """
    grid, living, capacity = None, 0, 0
    with _naming(file):
        _check_partners(name, held, config)
        for kind, tensor in held.items():
            check_codes(kind, tensor, config, tensor_key(name, kind))
        shape = _low_rank_shape(name, held, config)
        if "sparse_lora_values" in held:
            grid = _grid_of(held["sparse_lora_support"], config, name)
            if shape is not None and shape[:2] != (grid.rows, grid.cols):
                raise ValueError(
                    f"'{tensor_key(name, 'sparse_lora_A')}' and '{tensor_key(name, 'sparse_lora_B')}' belong to a "
                    f"weight of {shape[0]}x{shape[1]}, '{tensor_key(name, 'sparse_lora_support')}' beside them to one "
                    f"of {grid.rows}x{grid.cols}."
                )
            living, capacity = _check_support(name, held, grid, config)
    rows, cols = (grid.rows, grid.cols) if grid is not None else shape[:2]
    return ModuleSizes(rows, cols, grid, living, capacity, shape[2] if shape is not None else 0)


@contextmanager
def _naming(file: Path | str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"In '{file}': {error}") from error


def check_codes(kind: str, tensor: torch.Tensor, config: SparseLoraConfig, key: str) -> None:
    """Refuse masks and maps of factors that are not uint8 or hold a number that means nothing.

    Raises:
        ValueError: names the tensor.
    """
    masks = config.factor_masks
    largest = {"sparse_lora_rank_mask": 1}
    if masks is not None:
        top = masks.experts - 1 if masks.kind == "stochastic" else 2**masks.copies - 1
        largest |= {"sparse_lora_A_map": top, "sparse_lora_B_map": top}
    if kind in ("sparse_lora_A_map", "sparse_lora_B_map", "sparse_lora_A_start") and masks is None:
        raise ValueError(f"'{key}' belongs to factor_masks, which {CONFIG_FILE} does not ask for.")
    if kind == "sparse_lora_A_start" and not tensor.is_floating_point():
        raise ValueError(f"'{key}' is {tensor.dtype}; the start of a factor is floats.")
    if kind in largest and (tensor.dtype != torch.uint8 or (tensor.numel() and int(tensor.max()) > largest[kind])):
        numbers = "of 0 and 1" if largest[kind] == 1 else f"from 0 to {largest[kind]}"
        raise ValueError(f"'{key}' must be uint8 {numbers}; the file is damaged.")


def _check_partners(name: str, held: dict[str, torch.Tensor], config: SparseLoraConfig) -> None:
    def key(kind: str) -> str:
        return tensor_key(name, kind)

    pairs = [
        ("sparse_lora_values", "sparse_lora_support"),
        ("sparse_lora_A", "sparse_lora_B"),
        ("sparse_lora_gate", "sparse_lora_rank_mask"),
    ]
    for first, second in pairs:
        for present, absent in ((first, second), (second, first)):
            if present in held and absent not in held:
                raise ValueError(f"'{key(absent)}' is missing, the partner of '{key(present)}'.")
    if "sparse_lora_values" not in held and "sparse_lora_A" not in held:
        missing = "sparse_lora_values" if config.has_support else "sparse_lora_A"
        raise ValueError(f"'{key(missing)}' is missing beside '{key(next(iter(held)))}'.")
    left_out = config.density_pattern and not config.density_of(name)
    if config.has_support and not left_out and config.support_pattern.get(name, 1) and "sparse_lora_values" not in held:
        raise ValueError(f"'{key('sparse_lora_values')}' is missing: the config has a sparse half.")
    rank = config.rank_of(name)
    if rank and "sparse_lora_A" not in held:
        raise ValueError(f"'{key('sparse_lora_A')}' is missing: the config gives the module rank {rank}.")
    if "sparse_lora_A" in held and config.rank_allocation is not None and "sparse_lora_gate" not in held:
        raise ValueError(f"'{key('sparse_lora_gate')}' is missing: the config asks for rank_allocation.")
    if "sparse_lora_gate" in held and config.rank_allocation is None:
        raise ValueError(f"'{key('sparse_lora_gate')}' belongs to rank_allocation, which the config does not ask for.")
    if "sparse_lora_gate" in held and "sparse_lora_A" not in held:
        raise ValueError(f"'{key('sparse_lora_A')}' is missing, what '{key('sparse_lora_gate')}' gates.")


def _check_support(
    name: str, held: dict[str, torch.Tensor], grid: UnitGrid, config: SparseLoraConfig
) -> tuple[int, int]:
    key, values = tensor_key(name, "sparse_lora_values"), held["sparse_lora_values"]
    capacity = values.shape[0] if values.ndim else 0
    if capacity > grid.num_units:
        raise ValueError(
            f"'{key}' has {capacity} units where a weight of {grid.rows}x{grid.cols} has {grid.num_units}."
        )
    if tuple(values.shape) != grid.values_shape(capacity):
        raise ValueError(
            f"'{key}' is of shape {tuple(values.shape)}; {capacity} units of granularity '{grid.granularity}' of a "
            f"weight of {grid.rows}x{grid.cols} take {grid.values_shape(capacity)}."
        )
    due = config.capacity_pattern.get(name, config.support_pattern.get(name))
    if due is None and not config.support_pattern and config.units_per_module is not None:
        due = config.units_per_module
    elif due is None and not config.support_pattern and config.budget_rank is not None:
        due = counts_from_rank({name: grid}, config.budget_rank)[name]
    elif due is None and not config.support_pattern and config.num_entries is None and config.allocation == "uniform":
        due = uniform_counts({name: grid}, config.density_of(name))[name]
    if due is not None and due != capacity:
        raise ValueError(
            f"'{key}' has room for {capacity} units, and {CONFIG_FILE} makes it {due}. Use the config saved with the "
            "file."
        )
    units = decode_support(held["sparse_lora_support"], grid, capacity, tensor_key(name, "sparse_lora_support"))
    return units.numel(), capacity


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


def _low_rank_shape(name: str, held: dict[str, torch.Tensor], config: SparseLoraConfig) -> tuple[int, int, int] | None:
    """`(rows, cols, rank)` of the low-rank half, or None without one."""
    if "sparse_lora_A" not in held:
        return None
    A, B = held["sparse_lora_A"], held["sparse_lora_B"]
    shapes = (
        f"'{tensor_key(name, 'sparse_lora_A')}' has shape {tuple(A.shape)}, '{tensor_key(name, 'sparse_lora_B')}' "
        f"{tuple(B.shape)}"
    )
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{shapes}; they must be [r, in] and [out, r] of one r.")
    rank = config.rank_of(name)
    if A.shape[0] != rank:
        raise ValueError(
            f"{shapes}, and {CONFIG_FILE} gives the module rank {rank}. Use the config saved with the file."
        )
    for kind in ("sparse_lora_gate", "sparse_lora_rank_mask"):
        if kind in held and tuple(held[kind].shape) != (rank,):
            raise ValueError(
                f"'{tensor_key(name, kind)}' has shape {tuple(held[kind].shape)}; rank {rank} takes ({rank},)."
            )
    for kind, factor in (("sparse_lora_A_map", A), ("sparse_lora_A_start", A), ("sparse_lora_B_map", B)):
        if kind in held and held[kind].shape != factor.shape:
            raise ValueError(
                f"'{tensor_key(name, kind)}' has shape {tuple(held[kind].shape)}; its factor takes "
                f"{tuple(factor.shape)}."
            )
    due = _map_names(config)
    for kind in ("sparse_lora_B_map", "sparse_lora_A_map", "sparse_lora_A_start"):
        if (kind in held) != (kind in due):
            what = "is missing: the config asks for" if kind in due else "does not belong to the config's"
            raise ValueError(f"'{tensor_key(name, kind)}' {what} factor_masks. Use the config saved with the file.")
    return B.shape[0], A.shape[1], rank


def _map_names(config: SparseLoraConfig) -> tuple[str, ...]:
    """The tensors that `factor_masks` keeps beside the factors, as `factors.py` allocates them."""
    masks = config.factor_masks
    if masks is None:
        return ()
    if masks.kind == "stochastic" and masks.split == "B":
        return ("sparse_lora_B_map",)
    maps = ("sparse_lora_A_map", "sparse_lora_B_map")
    return maps if masks.kind == "parallel" else (*maps, "sparse_lora_A_start")
