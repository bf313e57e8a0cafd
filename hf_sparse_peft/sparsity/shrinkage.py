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


def nested_group_threshold(norms: Tensor, size: float) -> Tensor:
    r"""Factors `[r]` that the proximal operator of :math:`\xi \sum_b \|x_{b:}\|` multiplies `r` vectors of these norms
    by; the groups are nested tails, and the operator is the innermost group's first (Jenatton et al., 2011)."""
    factors, tail = torch.ones_like(norms), norms.new_zeros(())
    for b in range(norms.numel() - 1, -1, -1):
        tail = torch.hypot(norms[b], tail)
        factor = (1 - size / tail.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
        factors[b:] *= factor
        tail = tail * factor
    return factors


def nested_group_slopes(norms: Tensor) -> Tensor:
    r"""`[r]` numbers that vectors of these norms are multiplied by in the gradient of :math:`\sum_b \|x_{b:}\|`: of
    vector k :math:`\sum_{b \le k} 1 / \|x_{b:}\|`, without groups that are 0."""
    tails = norms.square().flip(0).cumsum(0).flip(0).sqrt()
    return torch.where(tails > 0, 1 / tails, 0.0).cumsum(0)
