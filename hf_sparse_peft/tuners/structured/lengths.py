"""Sizes cut into factors of about one length."""

from __future__ import annotations


def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors of `size`, of about one length and the longest first; 1 where there are no more primes."""
    primes, left, divisor = [], size, 2
    while left > 1:
        while left % divisor == 0:
            primes.append(divisor)
            left //= divisor
        divisor = divisor + 1 if divisor * divisor <= left else max(left, divisor + 1)
    found = [1] * count
    for prime in reversed(primes):
        found[found.index(min(found))] *= prime
    return tuple(sorted(found, reverse=True))
