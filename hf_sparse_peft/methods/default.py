"""The project's default, chosen by `recipes/benchmarks/learning.py`."""

from __future__ import annotations

from typing import Any, Literal

from ..sparsity import RankEquivalent
from ..training import AgedAdamWSpec
from .registry import Method, register, row


@register(
    "sparse-lora",
    paper="this project's sweep (recipes/benchmarks/learning.py)",
    moves="nothing",
    use_when="you want one adapter that is good without looking: start here, at LoRA's learning rate",
    cost="nothing before training: the weights choose the entries at injection",
)
def sparse_lora(r: int = 8, values_ratio: float | Literal["auto"] = "auto", **overrides: Any) -> Method:
    """A hybrid: rank `r`, and each weight's largest entries, a third as many numbers (`budget=RankEquivalent(r / 3)`,
    or `density=`).

    `values_ratio` is the learning rate of the entries over that of the factors; "auto" gives each weight the one with
    which LoRA's rate works unchanged (`training.values_rate`).
    """
    options = {"r": r, "lora_alpha": 2 * r, "budget": RankEquivalent(max(1, round(r / 3))), "criterion": "magnitude"}
    options |= {"target_modules": "all-linear", "optimizer": AgedAdamWSpec(values_ratio=values_ratio)}
    return row(overrides, **options)
