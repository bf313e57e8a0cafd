"""Who wins among equal scores, in Python's integers: SplitMix64 as its authors published it (Steele et al., 2014)."""

from __future__ import annotations

MASK = 2**64 - 1


def priority(seed: int, unit: int) -> int:
    """Output number `unit` of the generator started at `seed`, as a signed 64-bit integer; the highest wins."""
    z = (seed + (unit + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def best(scores: list[float], k: int, largest: bool = True, seed: int = 0) -> list[int]:
    """Python's own sort on Python floats: by score, then by priority."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if largest else scores[i], -priority(seed, i)))
    return sorted(order[:k])
