r"""The k-group envelope of WGSEF: the convex envelope of :math:`\tfrac12\|w\|^2` on vectors with at most k groups that
are not 0, and its proximal operator, from the norms of the groups alone."""

from __future__ import annotations

import torch
from torch import Tensor


def envelope_shares(norms: Tensor, k: float, sizes: Tensor | None = None, step: Tensor | float = 0.0) -> Tensor:
    r"""`[g]` float64 :math:`u_i = \mathrm{clip}(n_i / (\tau\sqrt{d_i}) - \lambda, 0, 1)` with
    :math:`\sum d_i u_i = k`; 1 for every group that is not 0 where k is at least their sizes together.

    Args:
        norms: :math:`n_i \geq 0` `[g]`.
        k: the budget, above 0: groups, or with `sizes` numbers.
        sizes: :math:`d_i` `[g]`; None: 1.
        step: :math:`\lambda`, one or `[g]`; 0 gives the shares of the envelope itself.
    """
    norms = norms.double()
    sizes = torch.ones_like(norms) if sizes is None else sizes.double()
    step = torch.as_tensor(step, dtype=torch.float64, device=norms.device)
    scaled = norms / sizes.sqrt()
    there = (scaled > 0).double()
    if k >= float((sizes * there).sum()):
        return there

    def shares(tau: Tensor) -> Tensor:
        return (scaled / tau - step).clamp(0, 1) * there

    # The sum falls in tau: every share is 1 at `low`, and together they are at most k at `high`.
    low = (scaled / (1 + step))[there > 0].min()
    high = torch.maximum(low, scaled.sum() * sizes.max() / k)
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        over = (sizes * shares(middle)).sum() > k
        low, high = (middle, high) if over else (low, middle)
    return shares(high)


def envelope(norms: Tensor, k: float, sizes: Tensor | None = None) -> Tensor:
    r""":math:`\tfrac12 \min_{0 \leq u \leq 1,\ \sum d_i u_i \leq k} \sum n_i^2 / u_i`, a float64 number."""
    shares = envelope_shares(norms, k, sizes)
    terms = norms.double().square() / shares
    return 0.5 * torch.where(norms > 0, terms, 0.0).sum()


def envelope_prox(norms: Tensor, k: float, step: Tensor | float, sizes: Tensor | None = None) -> Tensor:
    r"""Factors `[g]` :math:`u_i / (u_i + \lambda)` that the proximal operator of :math:`\lambda` times the envelope
    multiplies groups of these norms by; 0 where :math:`n_i \leq \lambda\tau\sqrt{d_i}`."""
    shares = envelope_shares(norms, k, sizes, step)
    return shares / (shares + step)
