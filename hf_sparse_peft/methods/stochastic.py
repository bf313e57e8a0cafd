"""Methods that mask the entries of low-rank factors."""

from __future__ import annotations

from typing import Any

from ..rules import FactorExperts
from ..tuners import FactorMaskConfig, SparseLoraConfig
from .registry import Method, register, with_overrides


@register(
    "capaboost",
    paper="Song et al., 2024",
    moves="nothing",
    use_when="a higher rank is wanted and no more parameters",
    cost="the product of rank copies * r; a byte of mask beside each 4-byte factor entry",
)
def capaboost(r: int = 8, lora_alpha: float = 16, copies: int = 2, density: float = 0.5, **overrides: Any) -> Method:
    """Parallel masked copies of one pair of factors; the LoRA form, on the query and value matrices (peft's default
    targets). `density` is that of the masks."""
    masks = FactorMaskConfig("parallel", copies=copies, density=density)
    return Method(
        SparseLoraConfig(
            **with_overrides({"r": r, "lora_alpha": lora_alpha, "density": 0.0, "factor_masks": masks}, overrides)
        )
    )


@register(
    "mosa",
    paper="Zhang et al., 2023",
    moves="which part of the factors trains, every forward pass",
    use_when="a plain adapter at the end, regularised by sparse experts on the way",
    cost="two forward passes a step",
)
def mosa(
    r: int = 8,
    lora_alpha: float = 16,
    experts: int = 4,
    split: str = "both",
    merge: str = "add",
    consistency: float = 1.0,
    **overrides: Any,
) -> Method:
    """Split factors, one expert a pass, two passes that should agree; merged for evaluation and by `compact()`.

    The paper's bottleneck adapters have a nonlinearity; this is its LoRA form (MoSL), on the query and value matrices
    (peft's default targets).
    """
    masks = FactorMaskConfig("stochastic", experts=experts, split=split, merge=merge)
    options = {"r": r, "lora_alpha": lora_alpha, "density": 0.0, "factor_masks": masks}
    options["schedule"] = [FactorExperts(consistency=consistency)]
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))
