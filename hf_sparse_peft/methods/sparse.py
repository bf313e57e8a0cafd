"""Sparse fine-tuning methods whose support is chosen once, or only thins out."""

from __future__ import annotations

from typing import Any

from ..rules import Prune
from ..tuners import SparseLoraConfig
from .registry import Method, register, with_overrides


@register(
    "gradual-pruning",
    paper="Zhu and Gupta, 2017",
    moves="support: thins out along a cubic curve",
    use_when="the final adapter must be small and a larger one helps to find it",
    cost="starts at twice the final numbers",
)
def gradual_pruning(density: float = 0.01, final_fraction: float = 0.5, **overrides: Any) -> Method:
    """Gradual magnitude pruning of the delta: `density` at first, `final_fraction * density` at the end."""
    options = {"r": 0, "density": density, "schedule": [Prune(final_fraction=final_fraction)]}
    options = with_overrides({**options, "target_modules": "all-linear"}, overrides)
    return Method(SparseLoraConfig(**options))


@register(
    "shira",
    paper="Bhardwaj et al., 2024",
    moves="nothing",
    use_when="a fixed random support is enough, or as the baseline for everything that chooses",
    cost="none",
)
def shira(density: float = 0.01, **overrides: Any) -> Method:
    """SHiRA's random mask, with a draw of its own for every layer (upstream draws one per shape)."""
    options = {"r": 0, "density": density, "criterion": "random", "target_modules": "all-linear"}
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))


@register(
    "super-tuning",
    paper="Super-Tuning (arXiv:2607.09287)",
    moves="nothing",
    use_when="a fixed support without data, on the largest weights",
    cost="one pass over each weight at injection",
)
def super_tuning(density: float = 0.01, r: int = 0, **overrides: Any) -> Method:
    """The largest weights as the support; `r > 0` adds the low-rank half of the paper's hybrid."""
    options = {"r": r, "density": density, "criterion": "magnitude", "target_modules": "all-linear"}
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))
