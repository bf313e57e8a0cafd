"""Methods whose rank moves."""

from __future__ import annotations

from typing import Any

from ..rules import Allocate, AverageRank, Orthogonality
from ..tuners import SparseLoraConfig
from .registry import Method, register


@register(
    "adalora",
    paper="Zhang et al., 2023",
    moves="rank: components compete over the whole model",
    use_when="layers need different ranks and nobody knows which",
    cost="two moving averages per low-rank number while it trains",
)
def adalora(r: int = 12, target_r: int = 8, orthogonality: float = 0.5, **overrides: Any) -> Method:
    """AdaLoRA's budget, importance and regulariser on the gate of every linear layer, as published; the rule does
    what upstream leaves to you."""
    rules = [Allocate(budget=AverageRank(target_r)), Orthogonality(orthogonality)]
    options = {"r": r, "density": 0.0, "schedule": rules, "target_modules": "all-linear"}
    return Method(SparseLoraConfig(**{**options, **overrides}))
