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
    points, numbers = (2, -1, config.r // 2), {"kernel_lora_mix": (3,), "kernel_lora_survivors": (1,)}
    if config.kernel != "mixed":
        del numbers["kernel_lora_mix"]
    if config.budget_competition is None:
        del numbers["kernel_lora_survivors"]
    expected = {"kernel_lora_P": points, "kernel_lora_Q": points, **numbers}
    for kind in sorted(set(expected) ^ set(held)):
        state = "is missing from" if kind in expected else "does not belong into"
        raise ValueError(
            f"'{tensor_key(name, kind)}' {state} '{file}' by its {CONFIG_FILE}. Use the config saved with the file."
        )
    for kind, wanted in expected.items():
        shape = tuple(held[kind].shape)
        fits = len(shape) == len(wanted) and all(w in (-1, s) for s, w in zip(shape, wanted, strict=True))
        if not fits or 0 in shape:
            raise ValueError(
                f"'{tensor_key(name, kind)}' in '{file}' has shape {shape}, and {CONFIG_FILE} with r={config.r} makes "
                f"it {wanted} (-1: as many as the weight has inputs or outputs)."
            )
    cols, rows = held["kernel_lora_P"].shape[1], held["kernel_lora_Q"].shape[1]
    if "kernel_lora_survivors" in held and not 0 <= int(held["kernel_lora_survivors"]) <= rows * cols:
        raise ValueError(
            f"'{tensor_key(name, 'kernel_lora_survivors')}' in '{file}' is no count of {rows * cols} entries."
        )
    size = sum(tensor.nbytes for tensor in held.values())
    return ModuleReport(name, rows, cols, None, 0, 0, 0.0, config.r, config.r, size, 0.0)
