"""A support beside a low-rank half."""

from __future__ import annotations

from typing import Any

from ..rules import ChooseSupport
from ..sparsity import UnitsPerModule
from ..training import AgedAdamWSpec
from .registry import Method, register, row


@register(
    "sltrain",
    paper="Han et al., 2024",
    moves="nothing",
    use_when="a low rank is too little and nobody knows which entries it misses",
    cost="4 bytes of index an entry in memory, one in the file",
)
def sltrain(density: float = 0.03, r: int = 128, lora_alpha: float = 32, **overrides: Any) -> Method:
    """`(alpha / r) B A + S` on a uniformly random fixed support, beside the frozen weight.

    The fine-tuning form: it starts as the identity, with B = 0 and values 0; `support_init="uniform"` draws the values
    from U(+-1/sqrt(columns)) as the pre-training form does.
    """
    options = {"r": r, "lora_alpha": lora_alpha, "density": density, "criterion": "random"}
    return row(overrides, **options, target_modules="all-linear")


@register(
    "dsee",
    paper="Chen et al., 2023",
    moves="nothing",
    use_when="LoRA, with a few entries for what no low rank reaches",
    cost="a decomposition of each weight at injection: minutes for large models",
)
def dsee(r: int = 4, lora_alpha: float = 32, num_sparse: int = 128, **overrides: Any) -> Method:
    """`(alpha / r)(U V + S2)` on the query and value matrices (peft's default targets), with `num_sparse` entries where
    a low-rank + sparse decomposition of the pretrained weight has its largest sparse entries. The paper's
    update, and the first of its three stages; `pruning.prune_globally(model, 0.2, by="update", target_modules=["query",
    "value"])`, and once more without `by` for the other matrices, prunes the base, or `pruning.kept_by_update` chooses
    heads; then it trains on. docs/pruning.md has all three, and what merging does to the zeros."""
    options = {
        "r": r,
        "lora_alpha": lora_alpha,
        "budget": UnitsPerModule(num_sparse),
        "criterion": "decomposition_residual",
        "scale_support": True,
        "factor_init": "normal",
    }
    return row(overrides, **options)


@register(
    "rosa",
    paper="Nikdan et al., 2024",
    moves="support: chosen once, by the gradients after a warm-up of the low-rank half",
    use_when="LoRA, with entries where the loss asks for them once the low rank has done what it can",
    cost="an fp32 gradient of every adapted weight at one step",
    claim="2.6 to 5.4 points over LoRA on GSM8K with Llama-2 7B (figures, one seed)",
)
def rosa(
    r: int = 16,
    lora_alpha: float = 16,
    density: float = 0.006,
    warmup: int = 64,
    steps: int = 1,
    reduction: str = "micro_batch",
    restart: bool = False,
    **overrides: Any,
) -> Method:
    """RoSA in one run: `warmup` steps of LoRA, masks by the mean of squared gradients, then both; `restart=True` puts
    the factors back to their start with the masks, as published. Entries are neither scaled nor dropped out, and train
    at 2e-4 where the factors train at 7e-4 (Llama-2 7B). The published masks are made from micro-batches of one example
    (`reduction="example"`)."""
    choice = ChooseSupport(warmup, steps, reduction=reduction, restart=restart)
    options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": 0.05, "density": density, "schedule": [choice]}
    optimizer = AgedAdamWSpec(values_ratio=2 / 7)
    return row(overrides, **options, optimizer=optimizer, target_modules="all-linear")
