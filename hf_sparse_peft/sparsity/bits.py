"""Masks at one bit an entry."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask of any shape as uint8 `[ceil(numel / 8)]`, its first entry in the lowest bit of the first byte."""
    flat = mask.reshape(-1).to(torch.uint8)
    short = -flat.numel() % 8
    if short:
        flat = torch.cat([flat, flat.new_zeros(short)])
    packed = flat.new_zeros(flat.numel() // 8)
    for bit in range(8):  # one byte an entry at most: a sum over int64 products would take eight
        packed |= flat[bit::8] << bit
    return packed


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The bool mask `[numel]` that `pack_bits` packed."""
    flat = packed.new_empty(packed.numel(), 8)
    for bit in range(8):
        flat[:, bit] = (packed >> bit) & 1
    return flat.view(-1)[:numel].bool()
