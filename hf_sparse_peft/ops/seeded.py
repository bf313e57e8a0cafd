r"""Random numbers that are a function of a seed and a position, and sums of random matrices that are never stored.

:math:`u_i = 2\,(h(i) \gg 8)\,2^{-24} - 1` with a 32-bit hash `h` of positions that the seed has permuted: integers, and
products with powers of two, so that every device, torch and chunk size give the same bits, and torch's generators
are neither read nor moved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import autocast_off

GENERATOR = "hash32"
"""Name of the function of seed and position, which files note: another one gets another name."""
_MASK, _CHUNK = 0xFFFFFFFF, 1 << 22


def hashed(seed: int, start: int, count: int, device: torch.device | str | None = None, bits: int = 32) -> Tensor:
    """int64 `[count]`: the hashes of `bits` bits, at most 32, of the positions `start`, ..., `start + count - 1` under
    `seed` (63 bits), distinct for the positions below `2**bits`.

    Mixing as in https://github.com/skeeto/hash-prospector (16 21f0aaad 15 735a2d97 15), whose factors are below 2**31,
    so that no product leaves int64.
    """
    mask, shifts = (1 << bits) - 1, [max(1, shift * bits // 32) for shift in (16, 15, 15)]
    stride, offset = (seed >> 31) | 1, seed & _MASK  # a bijection of the positions, one for each seed
    x = torch.arange(start, start + count, device=device).bitwise_and_(mask)
    x = x.mul_(stride & 0x7FFFFFFF).add_(offset).bitwise_and_(mask)
    x = x.bitwise_xor_(x >> shifts[0]).mul_(0x21F0AAAD).bitwise_and_(mask)
    x = x.bitwise_xor_(x >> shifts[1]).mul_(0x735A2D97).bitwise_and_(mask)
    return x.bitwise_xor_(x >> shifts[2])


def seeded_uniform(seed: int, *shape: int, start: int = 0, device: torch.device | str | None = None) -> Tensor:
    """fp32 numbers in [-1, 1) of that shape, row-major from position `start` on."""
    count = 1
    for side in shape:
        count *= side
    return hashed(seed, start, count, device).bitwise_right_shift_(8).float().mul_(2.0**-23).sub_(1.0).view(shape)


def seeded_permutation(seed: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """A permutation of 0, ..., `count - 1` (at most 2**32), int64: the order of their hashes, or where `count` is a
    power of two the hashes of so many bits themselves, which need no sorting."""
    bits = (count - 1).bit_length()
    if count == 1 << bits:
        return hashed(seed, 0, count, device, bits)
    return hashed(seed, 0, count, device).argsort()


@torch.compiler.disable
def seeded_combination(coefficients: Tensor, seed: int, rows: int, cols: int, scale: float) -> Tensor:
    r""":math:`c \sum_i \alpha_i U_i`, fp32 `[rows, cols]`, for `coefficients` `[k]` and scale c.

    The k matrices :math:`U_i` of `seeded_uniform(seed)` exist a few at a time, in this pass and again in the backward
    pass, :math:`\partial\alpha_i = c\,\langle \partial, U_i\rangle`; nothing is kept between the two.
    """
    return _Combination.apply(coefficients, seed, rows, cols, scale)


class _Combination(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coefficients: Tensor, seed: int, rows: int, cols: int, scale: float) -> Tensor:
        ctx.arguments = (seed, rows, cols, scale, coefficients.shape[0], coefficients.dtype)
        result = torch.zeros(rows * cols, device=coefficients.device)
        with autocast_off(coefficients.device.type):
            for first, block in _blocks(seed, rows * cols, coefficients.shape[0], coefficients.device):
                result += coefficients[first : first + block.shape[0]].float() @ block
        return result.mul_(scale).view(rows, cols)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        seed, rows, cols, scale, count, dtype = ctx.arguments
        flat = gradient.float().reshape(-1)
        with autocast_off(gradient.device.type):
            found = [block @ flat for _, block in _blocks(seed, rows * cols, count, gradient.device)]
        return torch.cat(found).mul_(scale).to(dtype), None, None, None, None


def _blocks(seed: int, numel: int, count: int, device: torch.device):
    step = max(1, _CHUNK // numel)
    for first in range(0, count, step):
        number = min(step, count - first)
        yield first, seeded_uniform(seed, number, numel, start=first * numel, device=device)
