"""Updates that are kernels of two point sets."""

from __future__ import annotations

from typing import Any

from ..rules import Allocate
from ..sparsity import Density
from ..tuners import KernelLoraConfig
from .registry import Method, register


@register(
    "snell",
    paper="Shen et al., 2024",
    moves="support: recomputed from the factors at every step",
    use_when="an update of high rank that chooses its own entries, without storing indices",
    cost="the update is built and ranked anew in every pass, 4 to 5 times a step",
)
def snell(r: int = 32, sparsity: float = 0.3, **overrides: Any) -> Method:
    """SNELL: the distance kernel, thinned inside each matrix. The authors train with lr 1e-3, AdamW, weight decay 0.01,
    `r` 8 to 32, all linears; `sparsity` (fraction of zeros) is tuned for each dataset. `mode="code"` is their code's
    squared update."""
    options = {"r": r, "kernel": "distance", "sparsity": sparsity, "target_modules": "all-linear"}
    return Method(KernelLoraConfig(**{**options, **overrides}))


@register(
    "snella",
    paper="Shen et al., 2025",
    moves="support: recomputed at every step; the entries that live move between matrices",
    use_when="as snell, where matrices differ in how much they have to learn",
    cost="as snell, and two moving averages per trained number while it trains",
)
def snella(r: int = 32, sparsity: float = 0.3, initial_sparsity: float = 0.0, **overrides: Any) -> Method:
    """SNELLA: the mixed kernel, and matrices that compete for the entries that live. The authors train all linears with
    lr 1e-3, AdamW, weight decay 0.05. In `mode="paper"` the softmax adds about 1/out to every entry at the start. The
    fraction of zeros goes from `initial_sparsity` (`init_thres`) to `sparsity`. The official code counts epochs for
    budget and allocation, so that runs of few epochs hardly move; `Allocate(every=...)` with an epoch's steps does."""
    rule = Allocate(spaces=("kernel",), budget=Density(round(1 - sparsity, 12)), every=1, fixed_at_end=False)
    options = {"r": r, "kernel": "mixed", "sparsity": initial_sparsity, "schedule": [rule]}
    options["target_modules"] = "all-linear"
    return Method(KernelLoraConfig(**{**options, **overrides}))
