"""Shrinkage operators: what a proximal step does to numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_threshold(x: Tensor, size: float) -> Tensor:
    r""":math:`\mathrm{sign}(x)\max(|x| - \xi, 0)`, the proximal operator of :math:`\xi\|x\|_1`; any shape and dtype."""
    return x.sign() * (x.abs() - size).clamp_min(0)


def dead_zone_threshold(x: Tensor, size: float) -> Tensor:
    r"""SoRA's released operator, three assignments in a row: as `soft_threshold` from :math:`2\xi` on, 0 below, where
    exactly :math:`|x| = \xi` stays."""
    shrunk = torch.where(x.abs() > size, soft_threshold(x, size), x)
    return torch.where(shrunk.abs() < size, torch.zeros_like(x), shrunk)
