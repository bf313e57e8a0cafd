"""Positions of few entries of a long vector as Golomb-Rice codes of the gaps between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..sparsity import pack_bits, unpack_bits

_LONGEST = 40
"""Bits of a gap that are written plainly, at most."""


def rice_bits(count: int, size: int) -> int:
    r"""Bits of a gap that are written plainly where `count` of `size` entries are coded, the best for entries that lie
    at random: :math:`b = \max(0, 1 + \lfloor\log_2 \frac{\log(\varphi - 1)}{\log(1 - p)}\rfloor)`, :math:`\varphi` the
    golden ratio and p the density."""
    if not 0 < count < size:
        return 0
    ratio = math.log((math.sqrt(5) - 1) / 2) / math.log1p(-count / size)
    return min(max(0, 1 + math.floor(math.log2(ratio))), _LONGEST)


def expected_bits(density: float) -> float:
    r"""Bits of a gap, in the mean over entries that lie at random: :math:`b + \frac{1}{1 - (1-p)^{2^b}}`."""
    bits = rice_bits(round(density * 10**9), 10**9)
    return bits + 1 / (1 - (1 - density) ** (2**bits))


def encode_positions(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    r"""Code sorted, distinct positions `[n]` below `size`: gaps :math:`g \ge 0` before each, its high bits
    :math:`g \gg b` in unary (so many zeros, then a one), its b low bits plainly.

    Returns:
        Unary codes and low bits, each packed into uint8.

    Raises:
        ValueError: positions out of order or out of range.
    """
    positions = positions.long()
    gaps = torch.diff(positions, prepend=positions.new_full((1,), -1)) - 1
    if positions.numel() and (int(gaps.min()) < 0 or int(positions[-1]) >= size):
        raise ValueError(f"positions must be sorted, distinct and below {size}.")
    bits = rice_bits(positions.numel(), size)
    ends = ((gaps >> bits) + 1).cumsum(0)
    unary = torch.zeros(int(ends[-1]) if ends.numel() else 0, dtype=torch.bool)
    unary[ends - 1] = True
    low = (gaps[:, None] >> torch.arange(bits)) & 1
    return pack_bits(unary), pack_bits(low.bool())


def decode_positions(unary: Tensor, low: Tensor, count: int, size: int, name: str) -> Tensor:
    """The positions `[count]`, int64, that `encode_positions` coded; nothing larger than the codes is allocated before
    they are known to hold `count` of them.

    Raises:
        ValueError: the codes hold another number of positions, or positions from `size` on; names `name`.
    """
    if not 0 <= count <= size:
        raise ValueError(f"'{name}' says that it holds {count} of {size} entries")
    for code in (unary, low):
        if code.dtype != torch.uint8 or code.ndim != 1:
            raise ValueError(f"'{name}' is coded in {code.dtype} of shape {tuple(code.shape)}; bytes are due")
    bits = rice_bits(count, size)
    if low.numel() != -(-count * bits // 8):
        raise ValueError(
            f"'{name}' has {low.numel()} bytes of low bits where {count} gaps take {-(-count * bits // 8)}"
        )
    ends = unpack_bits(unary, 8 * unary.numel()).nonzero().squeeze(1)
    if ends.numel() != count or unary.numel() != -(-(int(ends[-1]) + 1 if count else 0) // 8):
        raise ValueError(f"'{name}' holds {ends.numel()} codes where {count} are due")
    high = torch.diff(ends, prepend=ends.new_full((1,), -1)) - 1
    plain = unpack_bits(low, count * bits).view(count, bits).long()
    if bool(unpack_bits(low, 8 * low.numel())[count * bits :].any()):
        raise ValueError(f"'{name}' has bits behind its last code")
    gaps = (high << bits) + (plain << torch.arange(bits)).sum(1)
    positions = (gaps + 1).cumsum(0) - 1
    if count and (int(gaps.max()) >= size or int(positions[-1]) >= size):
        raise ValueError(f"'{name}' codes position {int(positions[-1])} of {size} entries")
    return positions
