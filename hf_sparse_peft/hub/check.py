"""Checking an adapter folder on its own: no base model, no network."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..tuners.shared.counts import layer_counts, numbers_beside
from ..tuners.shared.file_check import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, model_class, read_adapter
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
    modules = tuple(_report(name, file) for name in sorted(file.modules))
    return AdapterReport(
        path=folder,
        config=file.config,
        modules=modules,
        file_bytes=(folder / WEIGHTS_FILE).stat().st_size,
        other_bytes=sum(tensor.nbytes for tensor in file.others.values()),
        other_parameters=numbers_beside(
            file.others, model_class(file.config.peft_type).tuner_layer_cls, file.config.saved_base_weights
        ),
    )


def _report(name: str, file: AdapterFile) -> ModuleReport:
    rows, cols, sizes = file.sizes[name]
    held, model_cls = file.modules[name], model_class(file.config.peft_type)
    layer = model_cls.linear_cls(nn.Linear(cols, rows, bias=False, device="meta"), "default", name, None)
    layer.hold("default", file.config, sizes, held)
    counts = layer_counts(layer, "default")
    for space in counts.spaces:
        names = [spec.name for spec in layer.specs("default").values() if spec.space == space["kind"]]
        space["bytes"] = sum(held[one].nbytes for one in names)
    return ModuleReport(
        name=name,
        rows=rows,
        cols=cols,
        spaces=list(counts.spaces),
        density=counts.density,
        parameters=counts.living,
        bytes=sum(tensor.nbytes for tensor in held.values()),
    )
