"""A greedy low-rank + sparse decomposition of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def greedy_low_rank(
    weight: Tensor, rounds: int, inner: int, threshold: float, rank_step: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""`U` `[rows, k]`, `V` `[k, cols]` of :math:`W \approx U V + S` with a sparse `S` (GreBsmo, as DSEE uses it; Chen
    et al., 2023).

    A round repeats, `inner` times, :math:`U = \mathrm{orth}((W-S)V^\top)`, :math:`V = U^\top (W-S)` and `S` = the
    entries of :math:`W - UV` above `threshold` in size; then `V` gets `rank_step` more rows, the first of the R factor
    of :math:`W - UV - S`. It starts with random rows and ends after `rounds`, at full rank, or where less than 1e-6 of
    the weight is unexplained (more rows would fit rounding errors). `weight`: fp32 `[rows, cols]`.
    """
    rows, cols = weight.shape
    rank_step = min(rank_step, rows, cols)
    V = torch.randn(rank_step, cols, generator=generator, device=weight.device)
    S = torch.zeros_like(weight)
    negligible = 1e-6 * weight.norm()
    for number in range(rounds):
        for _ in range(inner):
            target = weight - S
            U = torch.linalg.qr(target @ V.t()).Q
            V = U.t() @ target
            S = weight - U @ V
            S[S.abs() <= threshold] = 0
        left = weight - U @ V - S
        if number + 1 == rounds or V.shape[0] + rank_step > min(rows, cols) or left.norm() <= negligible:
            break
        # The first rows of the R factor need the first columns of Q only.
        V = torch.cat([V, torch.linalg.qr(left[:, :rank_step]).Q.t() @ left])
    return U, V
