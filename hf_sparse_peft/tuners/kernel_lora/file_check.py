"""Checking the tensors of one module under a kernel adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from ..shared.file_check import CONFIG_FILE, tensor_key
from .config import KernelLoraConfig


def check_kernel_module(
    name: str, held: dict[str, torch.Tensor], config: KernelLoraConfig, file: Path | str
) -> tuple[int, int]:
    """Check the points of both sides, the mixed kernel's numbers and the survivors of one module.

    Returns `(rows, cols)` of its weight.

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
    if "kernel_lora_survivors" in held:
        shapes = [
            f"'{tensor_key(name, kind)}' has shape {tuple(held[kind].shape)}"
            for kind in ("kernel_lora_P", "kernel_lora_Q")
        ]
        key = tensor_key(name, "kernel_lora_survivors")
        check_survivors(held["kernel_lora_survivors"], rows * cols, key, file, f" ({', '.join(shapes)})")
    return rows, cols


def check_survivors(tensor: torch.Tensor, numel: int, key: str, file: Path | str, shapes: str = "") -> None:
    """Refuse what is no int64 count of a weight's entries; `shapes` tells how many these are.

    Raises:
        ValueError: names the tensor.
    """
    if tensor.dtype != torch.int64 or tensor.numel() != 1 or not 0 <= int(tensor) <= numel:
        raise ValueError(
            f"'{key}' in '{file}' is {tensor.tolist()} ({tensor.dtype}), no count of the {numel} entries of its "
            f"weight{shapes}, which is int64. The file is damaged or belongs to another base model."
        )
