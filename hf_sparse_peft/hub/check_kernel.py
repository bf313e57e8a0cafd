"""Checking the tensors of one module under a kernel adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from ..tuners import KernelLoraConfig
from .adapter_report import CONFIG_FILE, ModuleReport, tensor_key


def check_kernel_module(name: str, held: dict[str, torch.Tensor], config: KernelLoraConfig, file: Path) -> ModuleReport:
    """Check the points of both sides, the mixed kernel's numbers and the survivors of one module.

    Raises:
        ValueError: a tensor is missing, surplus or of another shape than the config makes it; names it.
    """
    expected = {"kernel_lora_P": 3, "kernel_lora_Q": 3, "kernel_lora_mix": 1, "kernel_lora_survivors": 1}
    expected |= {} if config.kernel == "mixed" else {"kernel_lora_mix": None}
    expected |= {} if config.budget_competition is not None else {"kernel_lora_survivors": None}
    for kind, dimensions in expected.items():
        key = tensor_key(name, kind)
        if (kind in held) != (dimensions is not None):
            state = "is missing from" if dimensions is not None else "does not belong into"
            raise ValueError(f"'{key}' {state} '{file}' by its {CONFIG_FILE}. Use the config saved with the file.")
        if dimensions is None:
            continue
        shape = tuple(held[kind].shape)
        wanted = {3: (2, shape[1] if len(shape) == 3 else 0, config.r // 2), 1: (3,) if kind[-3:] == "mix" else (1,)}
        if shape != wanted[dimensions] or 0 in shape:
            raise ValueError(
                f"'{key}' in '{file}' has shape {shape}, and {CONFIG_FILE} with r={config.r} makes it "
                f"{'(2, points, ' + str(config.r // 2) + ')' if dimensions == 3 else wanted[1]}."
            )
    cols, rows = held["kernel_lora_P"].shape[1], held["kernel_lora_Q"].shape[1]
    if "kernel_lora_survivors" in held and not 0 <= int(held["kernel_lora_survivors"]) <= rows * cols:
        raise ValueError(
            f"'{tensor_key(name, 'kernel_lora_survivors')}' in '{file}' is no count of {rows * cols} entries."
        )
    size = sum(tensor.nbytes for tensor in held.values())
    return ModuleReport(name, rows, cols, None, 0, 0, 0.0, config.r, config.r, size, 0.0)
