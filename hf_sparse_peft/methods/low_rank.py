"""Low-rank halves whose components compete, die, grow or are sampled, and masked factors."""

from __future__ import annotations

from typing import Any

from ..rules import (
    AdaptiveRowScale,
    Allocate,
    FactorExperts,
    FrobeniusDecay,
    GradientNoise,
    GroupLasso,
    GrowRank,
    Orthogonality,
    ProximalGate,
    SampleRank,
    StableRank,
)
from ..sparsity import AverageRank, Fraction
from ..training import AdamWSpec, AgedAdamWSpec
from ..tuners import FactorMaskConfig, GradientProjection, GradientSplit
from .registry import Method, register, row

_ALL_LINEAR = {"density": 0.0, "target_modules": "all-linear"}


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
    return row(overrides, r=r, lora_alpha=lora_alpha, density=0.0, factor_masks=masks)


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
    rules = [FactorExperts(consistency=consistency)]
    return row(overrides, r=r, lora_alpha=lora_alpha, density=0.0, factor_masks=masks, schedule=rules)


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
    return row(overrides, r=r, schedule=rules, **_ALL_LINEAR)


@register(
    "joint-budget",
    paper="this project; scores of Zhang et al., 2023",
    moves="rank and support: components and entries compete for one budget of trained numbers",
    use_when="nobody knows how many numbers belong to a low rank and how many to entries, nor in which layers",
    cost="two moving averages per trained number; starts with 1 / fraction times the numbers that are left",
)
def joint_budget(
    r: int = 16,
    density: float = 0.01,
    fraction: float = 0.5,
    once: bool = False,
    at_start: bool = False,
    **overrides: Any,
) -> Method:
    """Components and entries in one budget, ranked by smoothed sensitivity per number: `fraction` of the numbers that
    `r` and `density` start with is left. `once=True` makes one split for good after a tenth of the run, and
    `at_start=True` before the first step, by the best sparse + low-rank fit of the first gradients (`GradientSplit`).
    That is this project's reading of RA-SpaRC (OpenReview WgyDYMUfSK), of which the abstract alone could be read: an
    initialisation in one budget, which balances both parts by itself, better than LoRA and RoSA by its own account."""
    if at_start and once:
        raise ValueError(f"at_start={at_start} and once={once} both make the one split. Set one of them.")
    if at_start:
        options = {**_ALL_LINEAR, "density": density, "optimizer": AgedAdamWSpec(), "start": GradientSplit(fraction)}
        return row(overrides, r=r, **options)
    rule = Allocate(spaces=("rank", "support"), budget=Fraction(fraction), every=None if once else 10)
    options = {**_ALL_LINEAR, "density": density, "optimizer": AgedAdamWSpec()}
    return row(overrides, r=r, schedule=[rule], **options)


@register(
    "gora",
    paper="He et al., 2025",
    moves="rank: shared out once, by the first gradients",
    use_when="a LoRA whose ranks and first step should follow the task, without an SVD",
    cost="gradients of 32 batches before the first step; the model starts moved",
    claim="5.13 points over LoRA on GSM8K with Llama-3.1-8B, 2.05 over full fine-tuning at a high rank (abstract)",
)
def gora(
    r: int = 8,
    lora_alpha: float = 16,
    steps: int = 32,
    step_size: float = 0.05,
    sign: int = -1,
    least: int = 4,
    most: int = 32,
    **overrides: Any,
) -> Method:
    """GoRA: ranks of `r` on average by mean |W * G|, floored and clipped to `least` and `most`, and B from the
    gradient's projection on A (`GradientProjection` has the equations, and the options that rows of its code differ
    in). `sign=1` is the released code's, which starts up the loss. The authors train all linears of Llama-2 with lr
    2e-5, or q, k, v and o of Llama-3.1 with 5e-5, B 16 times as fast, cosine to 10 %, 3 % warm-up, 1 epoch."""
    start = GradientProjection(steps=steps, step_size=step_size, sign=sign, least=least, most=most)
    options = {"r": r, "lora_alpha": lora_alpha, "use_rslora": True, "start": start}
    return row(overrides, **options, optimizer=AdamWSpec(B_ratio=16.0), **_ALL_LINEAR)


@register(
    "lora-plus",
    paper="Hayou et al., 2024",
    moves="nothing",
    use_when="a wide model whose LoRA learns slowly at every learning rate",
    cost="a LoRA's",
)
def lora_plus(r: int = 8, ratio: float = 16.0, **overrides: Any) -> Method:
    """LoRA+: `B` learns `ratio` times as fast as `A`. Beside a support `optimizer=AgedAdamWSpec(B_ratio=16)` does."""
    return row(overrides, r=r, optimizer=AdamWSpec(B_ratio=ratio), **_ALL_LINEAR)


@register(
    "sora",
    paper="Ding et al., 2023",
    moves="rank: components whose gate falls under a threshold die, and may return",
    use_when="a LoRA that is to lose the ranks it does not need, by one weight",
    cost="one number a component",
)
def sora(r: int = 8, weight: float = 1e-2, **overrides: Any) -> Method:
    """SoRA: gates from N(0, 1), thresholded after every update by `weight` times their learning rate. The authors train
    all linears with lr 8e-4, weight decay 0.1 (0 for gates), gradients clipped at 0.1, 6 % warm-up; their code's rules
    are `[ProximalGate(3e-4, scaled_by_lr=False, kind="dead_zone"), L1Penalty(10, scope="gate")]`."""
    return row(overrides, r=r, schedule=[ProximalGate(weight)], optimizer=AdamWSpec(), **_ALL_LINEAR)


@register(
    "dylora",
    paper="Valipour et al., 2023",
    moves="rank: a drawn number of leading components trains at a step",
    use_when="one run is to give a LoRA of every rank up to r",
    cost="nothing; each component learns in a fraction of the steps",
)
def dylora(r: int = 8, freeze_lower: bool = True, **overrides: Any) -> Method:
    """DyLoRA, whose ranks are nested: `final_rank` of `SampleRank` ships any. The authors train q and v of RoBERTa with
    alpha 16, lr 5e-4, weight decay 0.1, 6 % warm-up."""
    return row(overrides, r=r, schedule=[SampleRank(freeze_lower=freeze_lower)], **_ALL_LINEAR)


@register(
    "increlora",
    paper="Zhang et al., 2023",
    moves="rank: modules that matter gain components",
    use_when="a small rank is to go where the loss asks for it, without training what is pruned later",
    cost="a dense gradient a step while ranks grow; r components allocated in each module",
)
def increlora(r: int = 16, target_r: int = 2, orthogonality: float = 0.1, **overrides: Any) -> Method:
    """IncreLoRA from rank 1 to `target_r` on average, at most `r` in a module. The authors train six kinds of modules
    of DeBERTaV3-base with alpha 16 to 32, lr 3.5e-4 to 2.2e-3, `modules` 2 to 22, `every` 100 to 1000 by task."""
    rules = [GrowRank(AverageRank(target_r), grow_by=max(target_r // 2, 1)), Orthogonality(orthogonality)]
    return row(overrides, r=r, schedule=rules, optimizer=AgedAdamWSpec(component_ages=True), **_ALL_LINEAR)


@register(
    "maestro",
    paper="Horváth et al., 2024",
    moves="rank: a drawn module trains a drawn number of leading components; the last of each leave",
    use_when="ranks are to be ordered and found, a module at a time",
    cost="nothing",
)
def maestro(r: int = 8, weight: float = 1.0, every: int | None = None, **overrides: Any) -> Method:
    """Maestro's ordered sampling and hierarchical group lasso, on the factors of an adapter instead of whole layers,
    with a proximal step; `GroupLasso(kind="gradient", tolerance=1e-7)` is the paper's. `weight` is this project's: the
    paper's values are unconfirmed. Weight decay is best 0."""
    rules = [SampleRank(modules="one", freeze_lower=False, rescaled=False), GroupLasso(weight, every=every)]
    return row(overrides, r=r, schedule=rules, **_ALL_LINEAR)


@register(
    "cuttlefish",
    paper="Wang et al., 2023",
    moves="rank: cut to the stable rank of the update once that has settled",
    use_when="ranks are to be found in the first epochs of the run that uses them",
    cost="an SVD of r x r a module and epoch",
)
def cuttlefish(
    r: int = 16, every: int | None = None, first: int = 15, frobenius_decay: float = 0.0, **overrides: Any
) -> Method:
    """Cuttlefish's detection and cut, on the update of an adapter instead of whole weights, without its factor xi (of
    `StableRank(scaled=True)`). It takes `first + 2` measurements at least, by default of an epoch each.
    `frobenius_decay` is decay of the factors' product in place of weight decay; the authors use both on whole nets."""
    decay = [FrobeniusDecay(frobenius_decay)] if frobenius_decay else []
    return row(overrides, r=r, schedule=[StableRank(every, first=first), *decay], **_ALL_LINEAR)


@register(
    "allora",
    paper="Huang & Balestriero, 2024",
    moves="nothing",
    use_when="short runs, where B starts slowly and dropout has no time to average out",
    cost="a LoRA's products once more",
)
def allora(r: int = 8, max_scale: float = 1.0, **overrides: Any) -> Method:
    """ALLoRA: no scaling, no dropout, and gradients larger where rows of the update are small. The authors train with
    lr 1e-4 and `max_scale` of 1 to 2."""
    return row(overrides, r=r, lora_alpha=r, schedule=[AdaptiveRowScale(max_scale)], **_ALL_LINEAR)


@register(
    "lora-ggpo",
    paper="Chang et al., 2025 (version 1; constants of sd-scripts)",
    moves="nothing",
    use_when="a LoRA that overfits: flat minima by noise on the weights",
    cost="a dense draw a layer, twice a pass",
)
def lora_ggpo(r: int = 8, sigma: float = 0.03, beta: float = 0.01, **overrides: Any) -> Method:
    """LoRA-GGPO: weights are perturbed in training passes, by their rows' norms and gradients."""
    return row(overrides, r=r, schedule=[GradientNoise(sigma, beta)], **_ALL_LINEAR)
