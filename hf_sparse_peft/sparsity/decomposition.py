"""Low-rank and low-rank + sparse approximations of a matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .selection import top_units


@torch.no_grad()
def greedy_low_rank(
    weight: Tensor, rounds: int, inner: int, threshold: float, rank_step: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""`U` `[rows, k]`, `V` `[k, cols]` of :math:`W \approx U V + S` with a sparse `S`: GreBsmo, as DSEE's released
    code runs it (Chen et al., 2023).

    A round sets `S` to 0 and repeats, `inner` times, :math:`U = \mathrm{orth}((W-S)V^\top)`, :math:`V = U^\top (W-S)`
    and `S` = the entries of :math:`W - UV` of size `threshold` or more; then `V` gets `rank_step` more rows, the first
    of the R factor of :math:`W - UV - S`. `V` starts as one random row. It ends after `rounds` (rank
    `1 + rank_step * (rounds - 1)`), before full rank, before a round that leaves `S` empty, or where `UV + S` is the
    weight to 1e-6 of its norm with at most a tenth of the entries in `S`. `weight`: fp32 `[rows, cols]`.
    """
    rows, cols = weight.shape
    rank_step = min(rank_step, rows, cols)
    V = torch.randn(1, cols, generator=generator, device=weight.device)
    found = None
    for _ in range(rounds):
        # Carried over from the round before, S would hold the whole residual, and U V would have nothing left to fit.
        S = torch.zeros_like(weight)
        for _ in range(inner):
            target = weight - S
            U = torch.linalg.qr(target @ V.t()).Q
            V = U.t() @ target
            S = weight - U @ V
            S[S.abs() < threshold] = 0
        if found is not None and not S.any():
            break
        found = U, V
        left = weight - U @ V - S
        complete = left.norm() <= 1e-6 * weight.norm() and S.count_nonzero() <= weight.numel() // 10
        if complete or V.shape[0] + rank_step >= min(rows, cols):
            break
        # The first rows of the R factor need the first columns of Q only.
        V = torch.cat([V, torch.linalg.qr(left[:, :rank_step]).Q.t() @ left])
    return found


_EXACT_SIDE = 2048  # sides up to here take a full SVD (seconds); larger ones a randomised one


@torch.no_grad()
def truncated_svd(
    matrix: Tensor, rank: int, iterations: int = 6, seed: int = 0, exact_side: int = _EXACT_SIDE
) -> tuple[Tensor, Tensor, Tensor]:
    r"""`U` `[rows, r]`, `S` `[r]` and `V^T` `[r, cols]` of `matrix`'s best approximation of rank r, fp32 or fp64.

    Where the smaller side is above `exact_side` it is a randomised one, `iterations` power iterations over `rank + 16`
    random directions drawn with `seed`; torch's own generator stays as it was.
    """
    side = min(matrix.shape)
    if side <= exact_side:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=min(rank + 16, side), niter=iterations)
    return U[:, :rank], S[:rank], V[:, :rank].t()


SVDFactors = tuple[Tensor, Tensor, Tensor]
"""`U`, `S` and `V^T`, as `truncated_svd` returns them."""


@torch.no_grad()
def low_rank_beside_entries(
    matrix: Tensor, rank: int, entries: int, own: SVDFactors | None = None, rounds: int = 10
) -> tuple[Tensor, Tensor]:
    r"""`B` `[rows, r]`, `A` `[r, cols]` with orthonormal rows, of a low :math:`\|M - B A - S\|_F^2` over sparse S of k
    entries: B A of rank r is the truncated SVD of :math:`M - S`, and S the k largest entries of :math:`M - B A`, in
    turns, until one gains less than a thousandth.

    Where that begins decides: one large entry takes over the singular vectors of a matrix of rank 1. So the largest
    entries of M are taken first, then an SVD of the rest; and S = 0 first, which is what a matrix of low rank alone
    wants. The lower of both goes on. At most `rounds + 1` truncated SVDs; `own` is that of M, of rank r at least.
    `matrix`: fp32 or fp64.
    """
    if not rank:
        return matrix[:, :0], matrix[:0]
    best = _beside(matrix, _svd(matrix, rank) if own is None else own, rank, entries)
    if not entries:
        return best.B, best.A
    by_entries = _beside(matrix, _svd(matrix - _largest(matrix, entries), rank), rank, entries)
    best = min(best, by_entries, key=lambda one: one.error)
    for _ in range(rounds):
        found = _beside(matrix, _svd(matrix - best.sparse, rank), rank, entries)
        gained, best = found.error < 0.999 * best.error, min(best, found, key=lambda one: one.error)
        if not gained:
            break
    return best.B, best.A


class _Found(NamedTuple):
    B: Tensor
    A: Tensor
    sparse: Tensor
    error: float


def _beside(matrix: Tensor, svd: SVDFactors, rank: int, entries: int) -> _Found:
    U, values, Vh = svd
    B, A = U[:, :rank] * values[:rank], Vh[:rank]
    left = matrix - B @ A
    sparse = _largest(left, entries)
    return _Found(B, A, sparse, float(left.sub_(sparse).square().sum(dtype=torch.float64)))


def _svd(matrix: Tensor, rank: int) -> SVDFactors:
    # One of many: a full SVD of a 512x512 matrix takes four times as long as a randomised one of rank 32.
    return truncated_svd(matrix, rank, exact_side=128)


def _largest(matrix: Tensor, count: int) -> Tensor:
    """`matrix` with all but its `count` largest entries at 0."""
    flat, units = torch.zeros_like(matrix).view(-1), top_units(matrix.abs().flatten(), count).long()
    flat[units] = matrix.flatten()[units]
    return flat.view_as(matrix)
