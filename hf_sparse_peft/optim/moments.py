"""Adam's two moments, whole or in 8 bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

SMALLEST_8BIT, BLOCK = 4096, 256
"""bitsandbytes' own: moments of fewer numbers stay in 32 bits; numbers that share one scale."""
_NAMES = ("exp_avg", "exp_avg_sq")


def start_moments(state: dict[str, Any], shape: tuple[int, ...], like: Tensor, bits: int) -> None:
    """Zero moments of `shape`: `exp_avg` and `exp_avg_sq` in the dtype and on the device of `like`, or uint8 with
    `exp_avg_scale`, `exp_avg_sq_scale`, fp32, one a block."""
    numel = torch.Size(shape).numel()
    for name in _NAMES:
        if bits == 8 and numel >= SMALLEST_8BIT:
            state[name] = torch.full(shape, _zero_code(name), dtype=torch.uint8, device=like.device)
            state[f"{name}_scale"] = torch.zeros(-(-numel // BLOCK), dtype=torch.float32, device=like.device)
        else:
            state[name] = torch.zeros(shape, dtype=like.dtype, device=like.device)


def drop_moments(state: dict[str, Any]) -> None:
    """Free them."""
    for name in _NAMES:
        state.pop(name, None)
        state.pop(f"{name}_scale", None)


def updated_moments(state: dict[str, Any], gradient: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    r""":math:`m \leftarrow \beta_1 m + (1-\beta_1) g`, :math:`v \leftarrow \beta_2 v + (1-\beta_2) g^2`. Returns both
    in the gradient's dtype, as they are before they are rounded; not to be changed.

    8-bit moments are read, and written back, as bitsandbytes does: blocks of 256 numbers relative to their largest, to
    the nearest of 256 values of its dynamic map, a signed one for `m`.
    """
    m, v = (_read(state, name, gradient) for name in _NAMES)
    m.lerp_(gradient, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    for name, value in zip(_NAMES, (m, v), strict=True):
        if value is not state[name]:
            _write(state, name, value)
    return m, v


def _read(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    kept = state[name]
    if kept.dtype != torch.uint8:
        return kept
    if kept.is_meta:
        return torch.empty_like(kept, dtype=like.dtype)
    from bitsandbytes.functional import dequantize_blockwise

    wide = dequantize_blockwise(kept, absmax=state[f"{name}_scale"], code=_code(name, kept.device), blocksize=BLOCK)
    return wide.to(like.dtype)


def _write(state: dict[str, Any], name: str, value: Tensor) -> None:
    if value.is_meta:
        return
    from bitsandbytes.functional import quantize_blockwise

    codes, scales = quantize_blockwise(value.float().contiguous(), code=_code(name, value.device), blocksize=BLOCK)
    state[name].copy_(codes.view_as(state[name]))
    state[f"{name}_scale"].copy_(scales.absmax)


@cache
def _code(name: str, device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "exp_avg").to(device)


@cache
def _zero_code(name: str) -> int:
    return int(_code(name, torch.device("cpu")).abs().argmin())
