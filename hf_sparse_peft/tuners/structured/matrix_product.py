r"""Matrix product operators: a matrix as a chain of small tensors, each with a part of its rows and of its columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .lengths import balanced_factors

TENSORS = 5
PUBLISHED = {768: (3, 4, 4, 4, 4), 3072: (4, 4, 8, 6, 4), 1024: (4, 4, 4, 4, 4), 4096: (4, 4, 8, 8, 4)}
"""Side -> its axes, from the released code (RUCAIBox/MPOE)."""


def axes_of(side: int) -> tuple[int, ...]:
    """`TENSORS` lengths whose product is `side`: the released ones, or of about one size, the longest in the middle."""
    if side in PUBLISHED:
        return PUBLISHED[side]
    found = balanced_factors(side, TENSORS)
    return found[3], found[1], found[0], found[2], found[4]


def shapes_of(rows: int, cols: int, bond: int | None = None) -> list[tuple[int, int, int, int]]:
    r"""Shapes :math:`(d_{k-1}, i_k, j_k, d_k)` of the tensors of a matrix `[rows, cols]`, :math:`\prod i_k` its rows
    and :math:`\prod j_k` its columns; bonds d as large as any matrix needs, at most `bond`."""
    i, j = axes_of(rows), axes_of(cols)
    sizes = [a * b for a, b in zip(i, j, strict=True)]
    bonds = [1]
    for at in range(1, TENSORS):
        full = min(math.prod(sizes[:at]), math.prod(sizes[at:]))
        bonds.append(full if bond is None else min(full, bond))
    bonds.append(1)
    return [(bonds[at], i[at], j[at], bonds[at + 1]) for at in range(TENSORS)]


@torch.no_grad()
def decompose(matrix: Tensor, bond: int | None = None) -> list[Tensor]:
    """The tensors of `matrix` `[rows, cols]`, by singular value decompositions from the left; exact without `bond`."""
    shapes = shapes_of(*matrix.shape, bond)
    i, j = [shape[1] for shape in shapes], [shape[2] for shape in shapes]
    order = [axis for at in range(TENSORS) for axis in (at, TENSORS + at)]
    left, found = matrix.reshape(*i, *j).permute(order).reshape(1, -1), []
    for d_left, i_k, j_k, d_right in shapes[:-1]:
        U, S, Vh = torch.linalg.svd(left.reshape(d_left * i_k * j_k, -1), full_matrices=False)
        found.append(U[:, :d_right].reshape(d_left, i_k, j_k, d_right))
        left = S[:d_right, None] * Vh[:d_right]
    return [*found, left.reshape(shapes[-1])]


def contract(tensors: list[Tensor]) -> Tensor:
    """The matrix `[rows, cols]` of the tensors."""
    found = tensors[0].flatten(0, 2)
    for tensor in tensors[1:]:
        found = (found @ tensor.flatten(1)).view(-1, tensor.shape[3])
    lengths = [length for tensor in tensors for length in tensor.shape[1:3]]
    order = [*range(0, 2 * TENSORS, 2), *range(1, 2 * TENSORS, 2)]
    return found.view(lengths).permute(order).reshape(math.prod(lengths[::2]), math.prod(lengths[1::2]))
