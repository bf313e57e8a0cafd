r"""Sorted positions in few bits: as Elias and Fano code them, one by one or as runs.

`n` positions below `u`, with :math:`l = \lfloor\log_2(u/n)\rfloor`: their `l` low bits one after the other, and a mask
whose bit `(p >> l) + i` stands for the i-th position p. Together :math:`n(2 + \log_2(u/n))` bits at most, half a bit
above the entropy of a random support; rows and blocks are runs, whose starts and lengths are coded alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...sparsity.bits import pack_bits, unpack_bits

PIECE = 2**12
"""Bytes of a code that are decoded at a time, so that temporaries do not grow with it."""


def code_length(count: int, size: int) -> int:
    """Bytes that `encode` needs for `count` positions below `size`."""
    low = _low_bits(count, size)
    return -(-count * low // 8) + -(-_mask_length(count, size, low) // 8)


def encode(positions: Tensor, size: int) -> Tensor:
    """`positions` (int64 `[n]`, strictly increasing, in `0 .. size - 1`) as uint8 `[code_length(n, size)]`."""
    count = positions.numel()
    low = _low_bits(count, size)
    bits = (positions[:, None] >> torch.arange(low)) & 1
    mask = torch.zeros(_mask_length(count, size, low), dtype=torch.bool)
    mask[(positions >> low) + torch.arange(count)] = True
    return torch.cat((pack_bits(bits.bool()), pack_bits(mask)))


def decode(codes: Tensor, count: int, size: int, name: str) -> Tensor:
    """The positions in `codes`, `[count]`, int32, or int64 where `size` is 2^31 or more.

    Raises:
        ValueError: `codes` has another length or another number of positions, or one is out of range; names `name`.
    """
    if codes.dtype != torch.uint8 or codes.ndim != 1 or not 0 <= count <= size:
        raise ValueError(f"'{name}' is damaged: {codes.dtype} of shape {tuple(codes.shape)} for {count} of {size}.")
    if codes.numel() != code_length(count, size):
        raise ValueError(f"'{name}' is damaged: {codes.numel()} bytes where {count} positions of {size} take "
                         f"{code_length(count, size)}.")  # fmt: skip
    low = _low_bits(count, size)
    split = -(-count * low // 8)
    found, done = torch.empty(count, dtype=torch.int32 if size < 2**31 else torch.int64), 0
    for places in _set_bits(codes[split:], _mask_length(count, size, low)):
        if done + places.numel() <= count:
            end = done + places.numel()
            high = (places - torch.arange(done, end)) << low
            found[done:end] = high + _fields(codes[:split], done, end, low)
        done += places.numel()
    if done != count:
        raise ValueError(f"'{name}' is damaged: it codes {done} positions instead of {count}.")
    if not rises(found, size):
        raise ValueError(f"'{name}' is damaged: its positions are not increasing within {size} entries.")
    return found


def rises(positions: Tensor, size: int) -> bool:
    """Whether the positions increase and end below `size`."""
    pieces = (positions[at : at + 8 * PIECE + 1] for at in range(0, positions.numel(), 8 * PIECE))
    inside = not positions.numel() or (int(positions[0]) >= 0 and int(positions[-1]) < size)
    return inside and all(bool((piece[1:] > piece[:-1]).all()) for piece in pieces)


def _set_bits(packed: Tensor, count: int) -> Iterator[Tensor]:
    """Places of the ones among the first `count` bits, in pieces."""
    for at in range(0, packed.numel(), PIECE):
        yield unpack_bits(packed[at : at + PIECE], min(8 * PIECE, count - 8 * at)).nonzero().view(-1) + 8 * at


def _fields(packed: Tensor, first: int, last: int, width: int) -> Tensor:
    """Numbers `first` to `last` of those that lie in `packed` with `width` bits each, int64."""
    begin, end = first * width // 8, -(-last * width // 8)
    bits = unpack_bits(packed[begin:end], 8 * (end - begin))[first * width - 8 * begin :]
    bits = bits[: (last - first) * width].view(last - first, width)
    found = torch.zeros(last - first, dtype=torch.int64)
    for bit in range(width):
        found += bits[:, bit].long() << bit
    return found


def runs_of(positions: Tensor) -> tuple[Tensor, Tensor]:
    """First positions of the maximal runs of neighbours in `positions`, and the number of positions up to each run's
    end; both int64, one for each run."""
    if not positions.numel():
        return positions, positions
    breaks = (positions[1:] != positions[:-1] + 1).nonzero().view(-1) + 1
    begins = torch.cat((breaks.new_zeros(1), breaks))
    return positions[begins], torch.cat((breaks, breaks.new_full((1,), positions.numel())))


def positions_of(starts: Tensor, ends: Tensor) -> Tensor:
    """The positions whose runs those are, of the dtype of `starts`."""
    if not starts.numel():
        return starts
    found = torch.ones(int(ends[-1]), dtype=starts.dtype)
    found[0] = starts[0]
    found[ends[:-1]] = starts[1:] - (starts[:-1] + (torch.diff(ends[:-1], prepend=ends.new_zeros(1)) - 1))
    return torch.cumsum(found, 0, dtype=starts.dtype, out=found)


def _low_bits(count: int, size: int) -> int:
    return max(size // count, 1).bit_length() - 1 if count else 0


def _mask_length(count: int, size: int, low: int) -> int:
    return count + ((size - 1) >> low) + 1 if count else 0
