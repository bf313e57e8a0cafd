"""Methods for bases that were pruned."""

from __future__ import annotations

from typing import Any

from ..tuners import MaskedLoraConfig
from .registry import Method, register


@register(
    "mask-lora",
    paper="Zimmer et al., 2023 (PERP)",
    moves="nothing",
    use_when="a pruned base is retrained, or tuned, and is to stay as sparse when the adapter is merged",
    cost="a bit a weight; two dense products a layer more than LoRA's",
)
def mask_lora(r: int = 16, lora_alpha: float = 32, mask: str = "zeros", **overrides: Any) -> Method:
    """MaskLoRA: a LoRA whose product is masked by what the base keeps, so that it trains as it is merged. The official
    code reads the mask off the weight in every pass; here it is a bit an entry, saved with the adapter. The authors
    train with AdamW without weight decay, linear decay after 10 % warm-up, rates of 5e-6 to 5e-4."""
    options = {"r": r, "lora_alpha": lora_alpha, "mask": mask, "target_modules": "all-linear"}
    return Method(MaskedLoraConfig(**{**options, **overrides}))
