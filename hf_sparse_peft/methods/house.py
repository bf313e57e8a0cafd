"""The house default, chosen by `recipes/benchmarks/learning_sweep.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..tuners import SparseLoraConfig
from .registry import Method, aged_adamw, register

VALUES_RATIO = 3.0
"""Entries start at 0 and move alone, factors multiply each other: entries learn best at about three times the factors'
learning rate, in the sweep that the module names."""


@register(
    "sparse-lora",
    paper="this project's sweep",
    moves="nothing",
    use_when="you want one adapter that is good without looking: start here",
    cost="one pass over each weight at injection",
)
def sparse_lora(r: int = 8, density: float = 0.005, values_ratio: float = VALUES_RATIO, **overrides: Any) -> Method:
    """A hybrid: rank `r` and the largest weights as entries, which learn at `values_ratio` x the learning rate."""
    options = {"r": r, "lora_alpha": 2 * r, "density": density, "criterion": "magnitude", **overrides}
    return Method(SparseLoraConfig(**options), make_optimizer=partial(aged_adamw, values_ratio=values_ratio))
