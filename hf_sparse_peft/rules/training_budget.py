"""What of a budget the spaces that train may have beside those that another rule excludes from the update."""

from __future__ import annotations

from collections.abc import Sequence

from .space import UnitSpace


def budget_of_training(budget: int, spaces: Sequence[UnitSpace], alive: list[int], sizes: list[int]) -> int:
    """The part of `budget`, which is for all `spaces`, of those that train: what the others do not have, and at least
    a part in proportion to their sizes."""
    excluded = sum(count for space, count in zip(spaces, alive, strict=True) if not space.trains)
    train = sum(size for space, size in zip(spaces, sizes, strict=True) if space.trains)
    return max(budget * train // sum(sizes), budget - excluded)
