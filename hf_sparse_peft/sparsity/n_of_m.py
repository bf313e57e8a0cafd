"""The largest so many of every few neighbours: masks of N:M sparsity."""

from __future__ import annotations

import torch
from torch import Tensor


def lowest_of_rows(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of each row of `scores` `[rows, cols]`, as bool; of equals the earlier one."""
    found = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count:
        found.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)
    return found


def n_of_m_mask(scores: Tensor, keep: int, of: int, axis: int = 1) -> Tensor:
    """Bool mask of the `keep` largest of every `of` consecutive `scores` along `axis`: exactly so many in each group.

    Args:
        scores: `[rows, cols]`, any float dtype.
        keep, of: N and M.
        axis: 1: groups of consecutive columns (inputs) of a row, 0: of consecutive rows (outputs) of a column.

    Raises:
        ValueError: groups do not divide that side.
    """
    if axis == 0:
        return n_of_m_mask(scores.t(), keep, of).t()
    if scores.shape[1] % of:
        raise ValueError(f"groups of {of} do not divide a side of {scores.shape[1]}: choose {keep}:{of} another way.")
    grouped = scores.reshape(-1, of)
    return lowest_of_rows(grouped, of - keep).logical_not_().view(scores.shape)
