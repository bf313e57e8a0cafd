"""Supports that a measurement of the model suggests: the weights that it does not miss, the best of some random
draws."""

from __future__ import annotations

from typing import Any

from ..rules import SearchSupport
from ..sparsity import Global
from ..tuners import SparseLoraConfig
from .registry import Method, register, with_overrides


@register(
    "essential-sparsity",
    paper="Jaiswal et al., 2023",
    moves="nothing",
    use_when="essential_sparsity(model, evaluate) first finds the share that the model does not miss; this trains it",
    cost="one evaluation a swept sparsity; the adapter has s* of all entries, which is many",
)
def essential_sparsity_support(sparsity: float = 0.1, **overrides: Any) -> Method:
    """Train exactly the entries that global one-shot magnitude pruning at `sparsity` would remove: those are free for
    the task, and every weight that the model needs stays as it is.

    The paper's own fine-tuning is the other half: the kept weights train and the removed ones stay 0. That is
    `SparseLoraConfig(r=0, criterion="magnitude", budget=Global(1 - s))` inside
    `with one_shot_pruned(model, s):`.

    Args:
        sparsity: take `essential_sparsity(model, evaluate).drop_point`; the default is the smallest share the paper
            sweeps.
    """
    if not 0 < sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity} is not a share in (0, 1). Take essential_sparsity(model, evaluate).drop_point; at 0 "
            "the model misses every weight, and no entry is free."
        )
    options = {"r": 0, "budget": Global(sparsity), "criterion": "smallest_magnitude", "target_modules": "all-linear"}
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))


@register(
    "random-search",
    paper="Bergstra and Bengio, 2012",
    moves="nothing",
    use_when="to know what a criterion is worth: it gets as many looks at the data, and no idea where to look",
    cost="at the start, trials x (steps training steps + batches forwards); nothing afterwards",
)
def random_search(
    density: float = 0.01,
    trials: int = 8,
    steps: int = 4,
    batches: int = 4,
    search_lr: float | None = None,
    **overrides: Any,
) -> Method:
    """Seeded random supports, each trained for some steps; training goes on with the one that has the smallest loss."""
    search = SearchSupport(trials=trials, steps=steps, batches=batches, lr=search_lr)
    options = {"r": 0, "density": density, "schedule": [search], "target_modules": "all-linear"}
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))
