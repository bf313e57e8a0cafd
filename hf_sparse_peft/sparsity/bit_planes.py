"""Integers of a bit depth of its own in each row, packed at that depth."""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import pack_bits, unpack_bits

MOST_BITS = 16
"""Largest bit depth: fp32 codes are exact far beyond it, but the powers of two that bound them are rounded."""


def pack_planes(codes: Tensor, depths: Tensor) -> Tensor:
    """Two's complement of `codes` `[rows, cols]`, integers in any dtype, row i at `depths[i]` bits (`[rows]`, integers
    from 0 to `MOST_BITS`).

    Returns uint8 `[sum of depths, ceil(cols / 8)]`: the bits of row 0 from the lowest, a line for each, then those of
    row 1. A line is packed by `pack_bits` and ends with bits of 0 where 8 does not divide the columns. A row of depth 0
    has no line.

    Raises:
        ValueError: a depth is out of range, or a code does not fit its row's.
    """
    cols = codes.shape[1]
    depths = depths.to(device=codes.device, dtype=torch.long)
    if int(depths.min()) < 0 or int(depths.max()) > MOST_BITS:
        raise ValueError(f"bit depths of {int(depths.min())} to {int(depths.max())}: 0 to {MOST_BITS} can be packed.")
    half = torch.where(depths > 0, 2.0 ** (depths - 1).double(), torch.zeros_like(depths, dtype=torch.double))
    low, high = codes.amin(1).double(), codes.amax(1).double()
    wrong = ((low < -half) | (high > (half - 1).clamp_min(0))).nonzero().flatten()
    if wrong.numel():
        row = int(wrong[0])
        raise ValueError(
            f"row {row} has codes from {low[row]:.0f} to {high[row]:.0f}, which do not fit its {int(depths[row])} bits."
        )
    first, width = _first_lines(depths), -(-cols // 8)
    planes = torch.zeros(int(depths.sum()), width, dtype=torch.uint8, device=codes.device)
    for bit in range(int(depths.max())):
        here = (depths > bit).nonzero().flatten()
        line = torch.zeros(here.numel(), width * 8, dtype=torch.bool, device=codes.device)
        line[:, :cols] = (codes[here].to(torch.int32) >> bit) & 1
        planes[first[here] + bit] = pack_bits(line).view(-1, width)
    return planes


def unpack_planes(planes: Tensor, depths: Tensor, cols: int) -> Tensor:
    """The int32 `[rows, cols]` codes that `pack_planes` packed; one bit of each at a time is unpacked beside them."""
    depths = depths.to(device=planes.device, dtype=torch.long)
    first, width = _first_lines(depths), -(-cols // 8)
    codes = torch.zeros(depths.numel(), cols, dtype=torch.int32, device=planes.device)
    for bit in range(int(depths.max())):
        here = (depths > bit).nonzero().flatten()
        line = unpack_bits(planes[first[here] + bit].flatten(), here.numel() * width * 8)
        line = line.view(-1, width * 8)[:, :cols].to(torch.int32) << bit
        top = (depths[here] == bit + 1)[:, None]  # the highest bit of a row is its sign
        codes.index_add_(0, here, torch.where(top, -line, line))
    return codes


def _first_lines(depths: Tensor) -> Tensor:
    return depths.cumsum(0) - depths
