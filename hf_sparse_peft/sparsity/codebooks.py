"""Codebooks: the numbers of a part of a row as codes into a few values of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sketch(NamedTuple):
    r""":math:`W_{ij} \approx` `codebooks[i, j // (n / g), codes[i, j]]`."""

    codebooks: Tensor
    """`[rows, groups, 2 ** bits]`, ascending."""
    codes: Tensor
    """uint8 `[rows, cols]`."""


@torch.no_grad()
def sketch(
    weight: Tensor, groups: int, bits: int, importance: Tensor | None = None, keep_zeros: bool = False, rounds: int = 25
) -> Sketch:
    r"""Codebooks and codes of a low :math:`\sum_j h_j (W_{ij} - \hat W_{ij})^2` in every row: k-means in one dimension,
    of each of the `groups` contiguous parts of a row on its own (SketchTune; Zhang et al., 2025).

    Lloyd's iteration from the quantiles of equal weight, at most `rounds` rounds, fp32 or wider; a value that nobody
    takes goes where the error is largest.

    Args:
        weight: `[rows, cols]`, floating point.
        groups: parts of a row; divides `cols`.
        bits: 1 to 8, of a code.
        importance: `[cols]`, `h`, such as the mean squares of the inputs; None: ones.
        keep_zeros: give value 0 a code of its own in every codebook where the weight has a zero, which exactly its
            zeros get; the other values are never 0.

    Raises:
        ValueError: `groups` does not divide the columns, or a number is not finite.
    """
    rows, cols = weight.shape
    if cols % groups:
        raise ValueError(f"groups={groups} does not divide the {cols} columns of a row into equal parts.")
    W = weight if weight.dtype == torch.float64 else weight.float()
    h = W.new_ones(cols) if importance is None else importance.to(W)
    if not (torch.isfinite(W).all() and torch.isfinite(h).all()):
        raise ValueError("The weight, or the importance of its columns, is not finite.")
    # An input that was never on has no say, and must have a code all the same.
    h = h.clamp_min(float(h.max()) * 1e-6 if float(h.max()) > 0 else 1.0)
    values = W.reshape(rows * groups, cols // groups)
    weights = h.view(groups, -1).repeat(rows, 1)
    size = 2**bits
    if keep_zeros and bool((W == 0).any()):
        codebooks, codes = _with_zero(values, weights, size, rounds)
    else:
        codebooks, codes = _kmeans(values, weights, size, rounds)
    return Sketch(codebooks.view(rows, groups, size), codes.view(rows, cols).to(torch.uint8))


def _kmeans(values: Tensor, weights: Tensor, size: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Values `[lines, size]` and codes `[lines, n]` of each line on its own: the better of two starts."""
    ordered, order = values.sort(1)
    weight = weights.gather(1, order)
    gaps = torch.diff(ordered, dim=1, prepend=ordered[:, :1])
    # Where density and weight are smooth, the best points are as dense as the cube root of their product.
    centres, codes, error = _lloyd(
        values, weights, _quantiles(ordered, (weight * gaps * gaps).pow(1 / 3), size), rounds
    )
    other, others, its = _lloyd(values, weights, _quantiles(ordered, weight, size), rounds)
    better = (its < error)[:, None]
    return torch.where(better, other, centres), torch.where(better, others, codes)


def _quantiles(ordered: Tensor, mass: Tensor, size: int) -> Tensor:
    """`[lines, size]`: what stands in the middles of `size` parts of equal mass."""
    mass = mass.cumsum(1)
    middles = (torch.arange(size, device=mass.device) + 0.5) / size * mass[:, -1:]
    return ordered.gather(1, torch.searchsorted(mass, middles.to(mass.dtype)).clamp_max(mass.shape[1] - 1))


def _lloyd(values: Tensor, weights: Tensor, centres: Tensor, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = _nearest(values, centres)
    for _ in range(rounds):
        total = torch.zeros_like(centres).scatter_add_(1, codes, weights)
        moments = torch.zeros_like(centres).scatter_add_(1, codes, weights * values)
        means = torch.where(total > 0, moments / total.clamp_min(1e-30), centres)
        means = _placed(means, total == 0, weights * (values - means.gather(1, codes)).square(), values)
        found = _nearest(values, means := means.sort(1).values)
        done = torch.equal(found, codes) and torch.equal(means, centres)
        centres, codes = means, found
        if done:
            break
    return centres, codes, (weights * (values - centres.gather(1, codes)).square()).sum(1)


def _placed(centres: Tensor, idle: Tensor, errors: Tensor, values: Tensor) -> Tensor:
    """Centres of which those that nobody takes stand at the values with the largest errors of their line."""
    most = min(int(idle.sum(1).max()), values.shape[1])
    if not most:
        return centres
    worst = errors.topk(most, 1)
    rank = (idle.cumsum(1) - 1).clamp(0, most - 1)
    moves = idle & (idle.cumsum(1) <= most) & (worst.values.gather(1, rank) > 0)
    return torch.where(moves, values.gather(1, worst.indices).gather(1, rank), centres)


def _nearest(values: Tensor, centres: Tensor) -> Tensor:
    """int64 `[lines, n]`: which of the ascending centres is nearest."""
    return torch.searchsorted(((centres[:, 1:] + centres[:, :-1]) / 2).contiguous(), values.contiguous())


def _with_zero(values: Tensor, weights: Tensor, size: int, rounds: int) -> tuple[Tensor, Tensor]:
    zero = values == 0
    # Zeros weigh nothing, and stand where they move no quantile but by their place.
    centres, codes = _kmeans(values, weights.masked_fill(zero, 0), size - 1, rounds)
    tiny = torch.finfo(torch.float32).tiny
    centres = torch.where(centres == 0, tiny, centres)
    below = (centres < 0).sum(1, keepdim=True)
    places = torch.arange(size - 1, device=values.device).expand_as(centres)
    places = places + (places >= below)
    codebooks = torch.zeros(values.shape[0], size, dtype=values.dtype, device=values.device)
    codebooks.scatter_(1, places, centres)
    return codebooks, torch.where(zero, below, places.gather(1, codes))
