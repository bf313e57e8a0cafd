"""Checking an adapter folder on its own: no base model, no network."""

from __future__ import annotations

import os
from pathlib import Path

from ..tuners import KernelLoraConfig
from ..tuners.kernel_lora.file_check import check_kernel_module
from ..tuners.shared.file_check import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, read_adapter
from ..tuners.sparse_lora.file_check import check_sparse_module
from .adapter_report import AdapterReport, ModuleReport


def check_adapter(path: str | os.PathLike) -> AdapterReport:
    """Read an adapter folder whole and verify what can be verified without its base model, as every loader does.

    Checked: the config's options and their types; that the file is as long as its header says; that no tensor is
    foreign, missing, of another dtype or lacks its partner; every support's version, base shape, order, range, count
    and checksum; shapes against each other and against the config; that values are finite. Not checked: whether the
    base has these modules.

    Raises:
        ValueError: a file is missing, truncated or unreadable, or a tensor is damaged, missing or inconsistent; the
            message names the file and the tensor.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path='{folder}' is no folder; give the one with {CONFIG_FILE} and {WEIGHTS_FILE}.")
    file = read_adapter(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    report = _kernel_report if isinstance(file.config, KernelLoraConfig) else _sparse_report
    modules = tuple(report(name, file) for name in sorted(file.modules))
    other_bytes = sum(tensor.nbytes for tensor in file.others.values())
    return AdapterReport(folder, file.config, modules, (folder / WEIGHTS_FILE).stat().st_size, other_bytes)


def _sparse_report(name: str, file: AdapterFile) -> ModuleReport:
    held = file.modules[name]
    sizes = check_sparse_module(name, held, file.config, file.path)
    entries = sizes.living * sizes.grid.unit_numel if sizes.grid is not None else 0
    sparse_bytes = sum(held[kind].nbytes for kind in ("sparse_lora_values", "sparse_lora_support") if kind in held)
    mask = held.get("sparse_lora_rank_mask")
    return ModuleReport(
        name=name,
        rows=sizes.rows,
        cols=sizes.cols,
        granularity=sizes.grid.granularity if sizes.grid is not None else None,
        k=sizes.living,
        capacity=sizes.capacity,
        density=entries / (sizes.rows * sizes.cols),
        rank=sizes.rank,
        components=sizes.rank if mask is None else int(mask.sum()),
        bytes=sum(tensor.nbytes for tensor in held.values()),
        bytes_per_entry=sparse_bytes / entries if entries else 0.0,
    )


def _kernel_report(name: str, file: AdapterFile) -> ModuleReport:
    held, r = file.modules[name], file.config.r
    rows, cols = check_kernel_module(name, held, file.config, file.path)
    return ModuleReport(name, rows, cols, None, 0, 0, 0.0, r, r, sum(t.nbytes for t in held.values()), 0.0)
