"""The rows and columns of a weight whose crossings hold the most of a score: the best sub-grid, greedily."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import excluding, stream_seed, top_units

_MOST_ROUNDS = 20


def best_subgrid(
    scores: Tensor,
    rows: int,
    columns: int,
    *,
    kept_rows: Tensor | None = None,
    kept_columns: Tensor | None = None,
    refined: bool = True,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""`rows` rows R and `columns` columns C of `scores` `[m, n]`, any float dtype, with a large sum over R x C.

    Three greedy pairs are compared: the largest row sums and column sums on their own; the largest row sums, then the
    largest column sums over these rows; and the other way round (LoSiA; Wang et al., 2025). The one with the largest
    sum wins, the first of equals. `refined` then takes rows by their sums over C and columns by theirs over R in turns
    until neither changes: every round's sum is at least the one before. The optimum is NP-hard to find and may be
    larger. `kept_rows` and `kept_columns` (sorted, distinct) are among the answer whatever their sums.

    Ties are drawn for with `seed`, the same on every rank. Returns sorted int32 or int64 numbers, `[rows]` and
    `[columns]`.

    Raises:
        ValueError: more rows or columns than there are, fewer than are kept, or scores that are not finite.
    """
    sides = (("rows", rows, scores.shape[0], kept_rows), ("columns", columns, scores.shape[1], kept_columns))
    for name, wanted, there, kept in sides:
        if not 1 <= wanted <= there:
            raise ValueError(f"{name}={wanted} must be between 1 and the {there} of the weight.")
        if kept is not None and kept.numel() > wanted:
            raise ValueError(f"{name}={wanted} cannot hold the {kept.numel()} {name} that are kept. Keep fewer.")
    scores = scores if scores.dtype == torch.float64 else scores.float()

    def best_rows(of: Tensor) -> Tensor:
        return _best_lines(of.sum(1), rows, kept_rows, stream_seed(seed, "rows"))

    def best_columns(of: Tensor) -> Tensor:
        return _best_lines(of.sum(0), columns, kept_columns, stream_seed(seed, "columns"))

    def total(pair: tuple[Tensor, Tensor]) -> float:
        return float(scores.index_select(0, pair[0]).index_select(1, pair[1]).double().sum())

    by_rows, by_columns = best_rows(scores), best_columns(scores)
    pairs = [
        (by_rows, by_columns),
        (by_rows, best_columns(scores.index_select(0, by_rows))),
        (best_rows(scores.index_select(1, by_columns)), by_columns),
    ]
    best = max(pairs, key=total)
    for _ in range(_MOST_ROUNDS if refined else 0):
        found = best_rows(scores.index_select(1, best[1]))
        pair = found, best_columns(scores.index_select(0, found))
        if total(pair) <= total(best):
            break
        best = pair
    return best


def _best_lines(sums: Tensor, count: int, kept: Tensor | None, seed: int) -> Tensor:
    """`count` lines with the largest sums, sorted, those of `kept` first of all."""
    if kept is None or not kept.numel():
        return top_units(sums, count, seed=seed)
    others = top_units(excluding(lambda: iter((sums.clone(),)), kept), count - kept.numel(), seed=seed)
    return torch.cat([kept.to(others.dtype), others]).sort().values
