"""The largest number that keeps a function within a bound."""

from __future__ import annotations

import math
from collections.abc import Callable


def largest_within(
    at: Callable[[float], float],
    bound: float,
    low: float,
    high: float,
    first: float,
    value_at_low: float,
    closeness: float = 0.05,
    resolution: float = 1e-10,
) -> tuple[float, float]:
    r"""The largest `x` in `[low, high]` found by bisection with :math:`f(x) \leq b`, and :math:`f(x)`.

    It ends where :math:`|f(x_a) - f(x_b)| < c\,b` at both ends of the bracket, or the bracket is not wider than
    `resolution` or than what floats tell apart. The lower end is returned, which was evaluated and is within the bound,
    not the bracket's middle, which was not. Values that are not finite are beyond any bound.

    Args:
        at: f; should not fall.
        bound: b.
        low: where f is known to be within the bound.
        high: the upper end, itself not evaluated.
        first: what is tried first.
        value_at_low: f(low).
        closeness: c.
        resolution: width of the bracket at which it ends.
    """
    value_at_high, x = math.inf, min(max(first, low), high)
    while high - low > resolution and abs(value_at_high - value_at_low) >= closeness * abs(bound):
        value = at(x)
        if value <= bound:
            low, value_at_low = x, value
        else:
            high, value_at_high = x, value
        middle = (low + high) / 2
        if middle in (low, high):
            break
        x = middle
    return low, value_at_low
