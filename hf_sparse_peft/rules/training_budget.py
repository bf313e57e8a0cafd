"""Sharing a budget out between the spaces that train and those that are held still."""

from __future__ import annotations

from collections.abc import Sequence

from .space import UnitSpace


def budget_of_training(budget: int, spaces: Sequence[UnitSpace], alive: list[int], sizes: list[int]) -> int:
    """The part of `budget`, which is for all `spaces`, that those which train share out: all that is not in spaces
    held still, at least their part of it by size."""
    held = sum(count for space, count in zip(spaces, alive, strict=True) if not space.trains)
    train = sum(size for space, size in zip(spaces, sizes, strict=True) if space.trains)
    return max(budget * train // sum(sizes), budget - held)
