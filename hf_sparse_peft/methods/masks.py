"""Weights that are pruned while an adapter trains: masks that move, over a base that stays as it is until merging."""

from __future__ import annotations

from typing import Any, Literal

from ..rules import Prune
from ..tuners import MaskedLoraConfig
from ..tuners.masked_lora import LowRankUpdate, StructuredScores
from .registry import Method, register


@register(
    "gradual-magnitude",
    paper="Zhu and Gupta, 2017",
    moves="mask: the smallest weights leave along a cubic curve",
    use_when="a dense model is to end sparse and tuned, and there is a run long enough to heal in",
    cost="a bit a weight; the masked weight is built in every pass: two dense products a layer more than LoRA's",
)
def gradual_magnitude(
    sparsity: float = 0.5,
    start: float = 0.0,
    end: float = 0.75,
    every: int = 10,
    score: Literal["merged", "base"] = "merged",
    r: int = 16,
    lora_alpha: float = 32,
    **overrides: Any,
) -> Method:
    r"""Gradual magnitude pruning of the weights under a masked LoRA, :math:`M \odot (W + s\,B A)`.

    Every `every` steps of the window each layer keeps its largest weights, as they would be merged (`score="merged"`)
    or those of the base (`"base"`); the sparsity follows the paper's cubic curve from 0 to `sparsity`. The paper trains
    the weights themselves (`update="dense"` here) and prunes every 100 to 1000 steps of long runs.
    """
    rule = Prune(1 - sparsity, start=start, end=end, every=every, space="mask", score=score)
    return _masked(overrides, r=r, lora_alpha=lora_alpha, schedule=[rule])


@register(
    "journey-matters",
    paper="Jin et al., 2025",
    moves="mask: the smallest weights leave along a cubic curve, from 25 % to 75 % of the run's compute",
    use_when="as gradual-magnitude, with the window that the authors' scaling laws recommend",
    cost="as gradual-magnitude; compute counts as if zeros cost nothing",
)
def journey_matters(
    sparsity: float = 0.5,
    unit: Literal["compute", "steps"] = "compute",
    fixed_share: float = 0.0,
    every: int = 10,
    r: int = 16,
    lora_alpha: float = 32,
    **overrides: Any,
) -> Method:
    """Iterative magnitude pruning from 25 % to 75 % of training compute, with the mask fixed for the rest. A cubic ramp
    stands in for the authors' shape, which could not be verified. Zeros save no time in this package: `unit="steps"`
    takes the fractions of the run's steps instead.
    """
    share = fixed_share if unit == "compute" else 0.0
    rule = Prune(1 - sparsity, start=0.25, end=0.75, every=every, space="mask", unit=unit, fixed_share=share)
    return _masked(overrides, r=r, lora_alpha=lora_alpha, schedule=[rule])


@register(
    "pst",
    paper="Li et al., 2022 (PST)",
    moves="mask: by magnitude and trained low-rank and structured scores, in every pass, along a cubic curve",
    use_when="a high sparsity is wanted of few trained numbers, and magnitudes alone choose badly",
    cost="a dense product more for the scores, and a selection over each weight in every pass",
)
def pst(
    sparsity: float = 0.9,
    r: int = 8,
    score_rank: int = 8,
    low_rank: float = 1.0,
    structured: float = 1.0,
    **overrides: Any,
) -> Method:
    r"""Parameter-efficient sparsity: a low-rank update without scaling, and a score
    :math:`|W + U V| + \alpha_1 A B + \alpha_2 (R + C)` of which the largest live. Sparsity rises from 10 % to 70 % of
    the run and is fixed then. The official optimizer holds these tensors alone; heads (`modules_to_save`) train here.
    """
    options = {
        "r": r,
        "lora_alpha": r,
        "update": LowRankUpdate(start="normal"),
        "masking": StructuredScores(score_rank, low_rank, structured),
        "schedule": [Prune(1 - sparsity, start=0.1, end=0.7, every=1, space="mask")],
    }
    return _masked(overrides, **options)


def _masked(overrides: dict[str, Any], **options: Any) -> Method:
    return Method(MaskedLoraConfig(**{"mask": "all", "target_modules": "all-linear", **options, **overrides}))
