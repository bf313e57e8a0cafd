"""A greedy low-rank + sparse decomposition of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


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
def truncated_svd(matrix: Tensor, rank: int, iterations: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    r"""`U` `[rows, r]`, `S` `[r]` and `V^T` `[r, cols]` of `matrix`'s best approximation of rank r, fp32 or fp64.

    Where the smaller side is above 2048 it is a randomised one, `iterations` power iterations over `rank + 16` random
    directions drawn with `seed`; torch's own generator stays as it was.
    """
    side = min(matrix.shape)
    if side <= _EXACT_SIDE:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=min(rank + 16, side), niter=iterations)
    return U[:, :rank], S[:rank], V[:, :rank].t()
