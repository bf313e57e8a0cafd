"""CUR decompositions: a matrix by some of its own columns and rows."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Greedy = Literal["deim", "one_row"]
"""How the greedy choice takes out what is chosen; see `greedy_indices`."""


class CURFactors(NamedTuple):
    r""":math:`W \approx C U R`."""

    rows: Tensor
    """int64 `[r]`, in the order in which they were chosen."""
    columns: Tensor
    """int64 `[r]`, likewise."""
    core: Tensor
    """U, fp64 `[r, r]`; `U[i, j]` stands between column `columns[i]` and row `rows[j]`."""


def cur_rank(rows: int, cols: int) -> int:
    r"""The largest r with :math:`r^2 + r(m + n) \le mn`: what C, U and R of a `[m, n]` matrix may have without taking
    more than the matrix (CURing, 2025)."""
    m, n = rows, cols
    r = (math.isqrt(m * m + 6 * m * n + n * n) - (m + n)) // 2
    # The root is rounded down, twice with the division.
    return r + 1 if (r + 1) ** 2 + (r + 1) * (m + n) <= m * n else r


@torch.no_grad()
def greedy_indices(vectors: Tensor, greedy: Greedy = "deim") -> Tensor:
    r"""`k` distinct indices, int64, of `k` orthonormal vectors `[n, k]`, fp64: one for each, where what the vectors
    before do not explain of it is largest.

    `"deim"` (Sorensen and Embree, 2016): of vector i the interpolation of the vectors before, exact at the indices
    chosen so far, is subtracted. `"one_row"`, as CURing's released code does it: after each choice :math:`p_i` every
    later vector becomes 0 at :math:`p_i` alone, by the least-norm combination of the vectors up to i, which undoes the
    zeros of earlier choices; entries chosen before are passed over. About half of random matrices get other indices,
    of similar error.
    """
    left, chosen = vectors.clone(), []
    for i in range(vectors.shape[1]):
        if greedy == "deim" and chosen:
            at = torch.stack(chosen)
            weights = torch.linalg.lstsq(vectors[at, :i], vectors[at, i : i + 1]).solution
            left[:, i] = vectors[:, i] - (vectors[:, :i] @ weights).squeeze(1)
        size = left[:, i].abs()
        if chosen:
            size[torch.stack(chosen)] = -1.0
        chosen.append(size.argmax())
        if greedy == "one_row":
            before = left[:, : i + 1]
            row = before[chosen[-1]]
            norm = row.square().sum()
            if norm > 0:
                left[:, i + 1 :] -= torch.outer(before @ row / norm, left[chosen[-1], i + 1 :])
    return torch.stack(chosen)


@torch.no_grad()
def cur(weight: Tensor, rank: int, input_scale: Tensor | None = None, greedy: Greedy = "deim") -> CURFactors:
    r"""CUR of a `[m, n]` matrix with `rank` rows and columns, chosen by the singular vectors of
    :math:`Z_{ij} = |W_{ij}|\,a_j`, and :math:`U = C^+ W R^+` (CURing, 2025).

    `input_scale`: `[n]`, the root mean square :math:`a_j` of each input over all tokens; None: ones. Everything is
    computed in fp64: the pseudoinverses of nearly dependent columns are large.

    Raises:
        ValueError: `rank` is not between 1 and the smaller side, or scale or weight are not finite.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank={rank} is no number of rows and columns of a {tuple(weight.shape)} matrix.")
    W = weight.double()
    Z = W.abs() if input_scale is None else W.abs() * input_scale.double()
    if not torch.isfinite(Z).all():
        raise ValueError("The weight, or the scale of its inputs, is not finite.")
    U, _, Vh = torch.linalg.svd(Z, full_matrices=False)
    rows, columns = greedy_indices(U[:, :rank], greedy), greedy_indices(Vh[:rank].t(), greedy)
    return CURFactors(rows, columns, torch.linalg.pinv(W[:, columns]) @ W @ torch.linalg.pinv(W[rows]))
