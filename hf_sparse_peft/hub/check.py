"""Checking an adapter folder on its own: no base model, no network."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from ..sparsity import GRANULARITIES, HEADER_BYTES, UnitGrid, counts_from_rank, decode_support, uniform_counts
from ..sparsity.codec import FORMAT_VERSION
from ..tuners import KernelLoraConfig, KernelLoraLayer, SparseLoraConfig
from ..tuners.file_length import check_file_length
from ..tuners.sparse_lora import SparseLoraLayer
from .adapter_report import CONFIG_FILE, WEIGHTS_FILE, AdapterReport, ModuleReport
from .adapter_report import tensor_key as _key
from .check_kernel import check_kernel_module

# As the codec's module docstring lays it out; granularity and block size of a file are known before any grid is.
_HEADER = struct.Struct("<2sBBIIIII")
_KINDS = (
    *SparseLoraLayer.adapter_layer_names,
    *SparseLoraLayer.factor_map_names,
    "sparse_lora_support",
    "sparse_lora_rank_mask",
)
_TENSORS = {
    SparseLoraConfig: (SparseLoraLayer, _KINDS),
    KernelLoraConfig: (KernelLoraLayer, (*KernelLoraLayer.adapter_layer_names, "kernel_lora_survivors")),
}


def check_adapter(path: str | os.PathLike) -> AdapterReport:
    """Read an adapter folder whole and verify what can be verified without its base model.

    Checked: the config's options; that the file is as long as its header says; every support's version, base shape,
    order, range, count and checksum; shapes against each other and against the config; that values are finite; that no
    tensor lacks its partner. Not checked: whether the base has these modules.

    Raises:
        ValueError: a file is missing, truncated or unreadable, or a tensor is damaged, missing or inconsistent; the
            message names the file and the tensor.
    """
    folder = Path(path)
    config = _read_config(folder)
    layer_cls, kinds = _TENSORS[type(config)]
    prefix = f"{config.peft_type.value.lower()}_"
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        bin_there = (folder / "adapter_model.bin").is_file()
        hint = "an adapter_model.bin is there: pickled files are never read, save it again" if bin_there else "copy it"
        raise ValueError(f"'{folder}' has no {WEIGHTS_FILE} ({hint}).")
    check_file_length(file)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    other_bytes = 0
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                tensor = tensors.get_tensor(key)
                name, kind = _split(key)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"'{key}' in '{file}' has values that are not finite; the adapter is damaged.")
                if kind in kinds:
                    modules.setdefault(name, {})[kind] = tensor
                elif kind.startswith(prefix) and kind not in layer_cls.training_state_names:
                    raise ValueError(
                        f"'{key}' in '{file}' is no tensor that this release knows. Update hf-sparse-peft."
                    )
                else:
                    other_bytes += tensor.nbytes
    except SafetensorError as error:
        raise ValueError(f"'{file}' is not readable as safetensors: {error}. Fetch or save it again.") from error
    if not modules:
        raise ValueError(
            f"'{file}' holds no tensor of a {config.peft_type.value} adapter; is it another adapter's file?"
        )
    check = check_kernel_module if isinstance(config, KernelLoraConfig) else _check_module
    reports = tuple(check(name, held, config, file) for name, held in sorted(modules.items()))
    pattern = getattr(config, "support_pattern", {})
    absent = sorted(n for n, count in pattern.items() if count and n not in _module_names(reports))
    if absent:
        raise ValueError(
            f"'{_key(absent[0], 'sparse_lora_values')}' is missing from '{file}': support_pattern in {CONFIG_FILE} "
            f"gives '{absent[0]}' {pattern[absent[0]]} units. The file is incomplete."
        )
    return AdapterReport(folder, config, reports, file.stat().st_size, other_bytes)


def _module_names(reports: tuple[ModuleReport, ...]) -> set[str]:
    return {report.name for report in reports}


def _read_config(folder: Path) -> SparseLoraConfig | KernelLoraConfig:
    if not folder.is_dir():
        raise ValueError(f"path='{folder}' is no folder; give the one with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"'{folder}' has no {CONFIG_FILE}; is this an adapter folder?")
    try:
        given: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is not JSON: {error}. Fetch or save it again.") from error
    classes = {"SPARSE_LORA": SparseLoraConfig, "KERNEL_LORA": KernelLoraConfig}
    found = given.get("peft_type") if isinstance(given, dict) else type(given).__name__
    if found not in classes:
        raise ValueError(f"'{file}' has peft_type={found!r}; only {' and '.join(classes)} adapters are checked here.")
    known = {field.name for field in fields(classes[found])}
    return classes[found](**{key: value for key, value in given.items() if key in known and key != "peft_type"})


def _split(key: str) -> tuple[str, str]:
    name, _, kind = key.rpartition(".")
    return name.removeprefix("base_model.model.").removeprefix("base_model.model"), kind


def _check_module(name: str, held: dict[str, torch.Tensor], config: SparseLoraConfig, file: Path) -> ModuleReport:
    grid, k, capacity, sparse_bytes = None, 0, 0, 0
    with _naming(file):
        _check_partners(name, held, config)
        shape = _low_rank_shape(name, held, config)
        if "sparse_lora_values" in held:
            grid, k, capacity = _check_support(name, held, config)
            if shape is not None and shape[:2] != (grid.rows, grid.cols):
                raise ValueError(
                    f"'{_key(name, 'sparse_lora_A')}' and '{_key(name, 'sparse_lora_B')}' belong to a weight of "
                    f"{shape[0]}x{shape[1]}, the support beside them to one of {grid.rows}x{grid.cols}."
                )
            sparse_bytes = held["sparse_lora_values"].nbytes + held["sparse_lora_support"].nbytes
    rows, cols = (grid.rows, grid.cols) if grid is not None else shape[:2]
    rank = shape[2] if shape is not None else 0
    components = int(held["sparse_lora_rank_mask"].sum()) if "sparse_lora_rank_mask" in held else rank
    entries = k * grid.unit_numel if grid is not None else 0
    return ModuleReport(
        name=name,
        rows=rows,
        cols=cols,
        granularity=grid.granularity if grid is not None else None,
        k=k,
        capacity=capacity,
        density=entries / (rows * cols),
        rank=rank,
        components=components,
        bytes=sum(tensor.nbytes for tensor in held.values()),
        bytes_per_entry=sparse_bytes / entries if entries else 0.0,
    )


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"In '{file}': {error}") from error


def _check_partners(name: str, held: dict[str, torch.Tensor], config: SparseLoraConfig) -> None:
    pairs = [
        ("sparse_lora_values", "sparse_lora_support"),
        ("sparse_lora_A", "sparse_lora_B"),
        ("sparse_lora_gate", "sparse_lora_rank_mask"),
    ]
    for first, second in pairs:
        for present, absent in ((first, second), (second, first)):
            if present in held and absent not in held:
                raise ValueError(f"'{_key(name, absent)}' is missing, the partner of '{_key(name, present)}'.")
    if config.has_support and config.support_pattern.get(name, 1) and "sparse_lora_values" not in held:
        raise ValueError(f"'{_key(name, 'sparse_lora_values')}' is missing: the config has a sparse half.")
    rank = _config_rank(name, config)
    if rank and "sparse_lora_A" not in held:
        raise ValueError(f"'{_key(name, 'sparse_lora_A')}' is missing: the config gives the module rank {rank}.")
    if "sparse_lora_A" in held and config.rank_allocation is not None and "sparse_lora_gate" not in held:
        raise ValueError(f"'{_key(name, 'sparse_lora_gate')}' is missing: the config asks for rank_allocation.")
    if "sparse_lora_gate" in held and "sparse_lora_A" not in held:
        raise ValueError(f"'{_key(name, 'sparse_lora_A')}' is missing, what '{_key(name, 'sparse_lora_gate')}' gates.")


def _config_rank(name: str, config: SparseLoraConfig) -> int:
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)


def _check_support(name: str, held: dict[str, torch.Tensor], config: SparseLoraConfig) -> tuple[UnitGrid, int, int]:
    key, values, codes = _key(name, "sparse_lora_values"), held["sparse_lora_values"], held["sparse_lora_support"]
    capacity = values.shape[0] if values.ndim else 0
    grid = _grid_of(codes, config, name)
    if capacity > grid.num_units:
        raise ValueError(
            f"'{key}' has {capacity} units where a weight of {grid.rows}x{grid.cols} has {grid.num_units}."
        )
    if not values.is_floating_point() or tuple(values.shape) != grid.values_shape(capacity):
        raise ValueError(
            f"'{key}' is {values.dtype} of shape {tuple(values.shape)}; {capacity} units of granularity "
            f"'{grid.granularity}' of a weight of {grid.rows}x{grid.cols} take floats of {grid.values_shape(capacity)}."
        )
    units = decode_support(codes, grid, capacity, _key(name, "sparse_lora_support"))
    due = config.capacity_pattern.get(name, config.support_pattern.get(name))
    if due is None and not config.support_pattern and config.units_per_module is not None:
        due = config.units_per_module
    elif due is None and not config.support_pattern and config.budget_rank is not None:
        due = counts_from_rank({name: grid}, config.budget_rank)[name]
    elif due is None and not config.support_pattern and config.num_entries is None and config.allocation == "uniform":
        due = uniform_counts({name: grid}, config.density)[name]
    if due is not None and due != capacity:
        raise ValueError(
            f"'{key}' has room for {capacity} units, and {CONFIG_FILE} makes it {due}. Use the config saved with "
            "the file."
        )
    return grid, units.numel(), capacity


def _grid_of(codes: torch.Tensor, config: SparseLoraConfig, name: str) -> UnitGrid:
    key, granularity_due = _key(name, "sparse_lora_support"), config.granularity_of(name)
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
        f"'{_key(name, 'sparse_lora_A')}' has shape {tuple(A.shape)}, '{_key(name, 'sparse_lora_B')}' {tuple(B.shape)}"
    )
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"{shapes}; they must be [r, in] and [out, r] of one r.")
    rank = _config_rank(name, config)
    if A.shape[0] != rank:
        raise ValueError(
            f"{shapes}, and {CONFIG_FILE} gives the module rank {rank}. Use the config saved with the file."
        )
    for kind in ("sparse_lora_gate", "sparse_lora_rank_mask"):
        if kind in held and tuple(held[kind].shape) != (rank,):
            raise ValueError(f"'{_key(name, kind)}' has shape {tuple(held[kind].shape)}; rank {rank} takes ({rank},).")
    for kind, factor in (("sparse_lora_A_map", A), ("sparse_lora_A_start", A), ("sparse_lora_B_map", B)):
        if kind in held and held[kind].shape != factor.shape:
            raise ValueError(
                f"'{_key(name, kind)}' has shape {tuple(held[kind].shape)}; its factor takes {tuple(factor.shape)}."
            )
    if config.factor_masks is not None and "sparse_lora_B_map" not in held:
        raise ValueError(f"'{_key(name, 'sparse_lora_B_map')}' is missing: the config asks for factor_masks.")
    mask = held.get("sparse_lora_rank_mask")
    if mask is not None and (mask.dtype != torch.uint8 or int(mask.max()) > 1):
        raise ValueError(f"'{_key(name, 'sparse_lora_rank_mask')}' must be uint8 of 0 and 1; the file is damaged.")
    return B.shape[0], A.shape[1], rank
