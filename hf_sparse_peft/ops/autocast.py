"""Autocast, asked of any device: the meta device has none, and torch refuses the question there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast gives products on that type of device; None where it is off, or there is none."""
    on = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def autocast_off(device_type: str) -> AbstractContextManager:
    """A context without autocast on that type of device."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)
