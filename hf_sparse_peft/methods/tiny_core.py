"""Updates with fixed or shared bases and a small trained core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..rules import FreezeGradually, ProximalGate
from ..tuners import SpectralLoraConfig
from ..tuners.shared.file_check import CONFIG_FILE, read_config
from ..tuners.spectral_lora import (
    LDU,
    SVD,
    Diagonal,
    Energy,
    Fastfood,
    Full,
    GradientSVD,
    MaskedB,
    RandomA,
    RandomBases,
    RandomCombination,
    Shards,
    SharedBases,
    SpectrumSpread,
    TwoFactors,
)
from .registry import Method, register


@register(
    "lora-xs",
    paper="Bałazy et al., 2024",
    moves="nothing",
    use_when="an adapter of r * r numbers a module, whatever the width",
    cost="an SVD of each weight at injection; the bases are in the file, or found again in the base",
)
def lora_xs(r: int = 64, lora_alpha: float = 16, std: float = 1e-5, saved: bool = True, **overrides: Any) -> Method:
    """LoRA-XS: a full core between the leading singular vectors, the singular values on the input side, as released;
    the update starts at N(0, std^2), not at 0. With `saved=False` files leave the bases out, which are found again in
    the base. The authors train with lr 4e-3 (r 64, 7B), 10 to 50 times LoRA's."""
    bases = SVD(values_in_A=True, saved=saved)
    options = {"r": r, "lora_alpha": lora_alpha, "bases": bases, "core": Full(std=std)}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "lora-sb",
    paper="Ponkshe et al., 2024",
    moves="nothing",
    use_when="LoRA-XS that starts with the best approximation of full fine-tuning's first step",
    cost="one pass over some examples and an SVD of each weight's gradient before the first step",
)
def lora_sb(r: int = 96, step_size: float = 3e-7, examples: int = 50, **overrides: Any) -> Method:
    """LoRA-SB: the core between the singular vectors of -step_size * sign(gradient), which it starts with; scaling 1,
    on the original base. The authors train Mistral-7B with lr 1e-4 (r 96), RoBERTa-large with 1e-3 (r 24)."""
    options = {"r": r, "bases": GradientSVD(step_size, examples), "core": Full("values")}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "svfit",
    paper="Sun et al., 2024 (abstract; details are this project's)",
    moves="nothing",
    use_when="r numbers a module, the largest singular values themselves",
    cost="an SVD of each weight at injection; bases of r * (in + out) numbers in memory and file",
)
def svfit(r: int = 256, energy: float | None = None, **overrides: Any) -> Method:
    r"""SVFit: :math:`U_r\,\mathrm{diag}(\sigma - \sigma^0)\,V_r^\top`, whose diagonal is trained from 0, so that
    weight decay pulls towards the pretrained singular values. With `energy=0.99` each weight has as many components as
    hold 99 % of its squared singular values (which measure the authors mean was not confirmed), at most r."""
    options = {"r": r, "bases": SVD(ranks=None if energy is None else Energy(energy)), "core": Diagonal()}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "nola",
    paper="Koohpayegani et al., 2024",
    moves="nothing",
    use_when="a file of a few hundred numbers a module, whatever width and rank",
    cost="every pass draws 2 k random matrices of a LoRA's size anew, forwards and backwards",
)
def nola(r: int = 8, lora_alpha: float = 8, k: int = 512, init: str = "offset", **overrides: Any) -> Method:
    """NOLA: both factors of a LoRA are trained sums of k random matrices each, of which nothing is stored. The authors
    train GPT-2 M with lr 5e-3 on the query and value matrices (peft's default targets)."""
    options = {"r": r, "lora_alpha": lora_alpha, "bases": RandomCombination(k, init=init), "core": None}
    return Method(SpectralLoraConfig(**{**options, **overrides}))


@register(
    "loldu",
    paper="Shi et al., 2024",
    moves="nothing",
    use_when="r + 1 numbers a module, without an SVD",
    cost="an LU decomposition of each weight at injection; the factors are saved",
)
def loldu(r: int = 64, lora_alpha: float = 16, init: str = "values", **overrides: Any) -> Method:
    """LoLDU: the first r pivots of W = P L D U and their scaling are trained. `init` "values", "values_uniform",
    "values_normal" and "values_mean" (the code's lu, uniform, normal, constant) start at the base, which the code's
    aliased storage makes so; "uniform", "normal", "ones" and "zeros" (s_uniform, s_normal, ...) away from it."""
    core = Diagonal(init, "init" if init.startswith("values") else "values", trained_scale=True)
    options = {"r": r, "lora_alpha": lora_alpha, "bases": LDU(), "core": core}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "lora-mini",
    paper="Singh et al., 2024 (abstract; sizes, start and scaling are this project's)",
    moves="nothing",
    use_when="a LoRA between two fixed random projections: r * (a + b) numbers a module",
    cost="two random projections in memory, in no file",
)
def lora_mini(r: int = 16, lora_alpha: float = 16, inner: int = 64, **overrides: Any) -> Method:
    """LoRA-Mini: LoRA's factors split in two each, of which the inner ones are trained. The outer projections have
    `inner` components and follow from the seed."""
    bases, core = RandomBases(inner, inner), TwoFactors()
    options = {"r": r, "lora_alpha": lora_alpha, "bases": bases, "core": core}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "lori",
    paper="Zhang et al., 2025",
    moves="nothing; which entries of B train may be taken from a first run",
    use_when="adapters of several tasks are to be merged, or a LoRA is to have half or a twentieth of its numbers",
    cost="a LoRA's without A's gradient and optimizer state; the masked form needs a first run",
    claim="up to 95 % fewer trained numbers than LoRA's, less interference between merged tasks (abstract)",
)
def lori(
    r: int | None = None,
    lora_alpha: float | None = None,
    mask_from: str | Path | None = None,
    sparsity: float = 0.9,
    scope: str = "model",
    rounding: str = "round",
    **overrides: Any,
) -> Method:
    """LoRI-D: a LoRA (r 32, alpha 64) whose A is random and fixed. With `mask_from`, the folder of such a run's
    adapter, LoRI-S: B starts at 0 again and trains at its 1 - `sparsity` largest entries of then, over the whole model;
    r, alpha, targets and seed are the first run's.

        methods.get("lori", seed=1)                              # trained, saved to "first"
        methods.get("lori", mask_from="first")

    A follows from `seed` and the module's name (the official code's second run may draw another); give every task a
    seed of its own. The authors train with a constant rate, S at ten times D's (5e-5 and 5e-4 on Llama-3 8B), without
    weight decay, and merge by `add_weighted_adapter(names, [0.4] * 3, "merged", "cat")` or "linear"."""
    bases = MaskedB(None if mask_from is None else str(mask_from), sparsity, scope, rounding)
    defaults = {"r": 32, "lora_alpha": 64.0, "target_modules": "all-linear"}
    if mask_from is not None:
        first = read_config(Path(mask_from) / CONFIG_FILE)
        if isinstance(first, SpectralLoraConfig):  # any other is refused at injection
            defaults = {name: getattr(first, name) for name in (*defaults, "rank_pattern", "seed", "task_type")}
    given = {"r": r, "lora_alpha": lora_alpha, **overrides}
    options = {**defaults, **{name: value for name, value in given.items() if value is not None}}
    return Method(SpectralLoraConfig(**{"bases": RandomA() if mask_from is None else bases, "core": None, **options}))


@register(
    "sharelora",
    paper="Song et al., 2024",
    moves="nothing",
    use_when="LoRA with about half of its numbers",
    cost="a LoRA's",
)
def sharelora(r: int = 16, lora_alpha: float = 16, sides: str = "A", **overrides: Any) -> Method:
    """ShareLoRA: A is one matrix for all modules of one type (ShareA), or B ("B"), or both ("AB"). The released code
    does so for the query and value matrices (peft's default targets)."""
    options = {"r": r, "lora_alpha": lora_alpha, "bases": SharedBases(sides), "core": None}
    return Method(SpectralLoraConfig(**{**options, **overrides}))


@register(
    "mos",
    paper="Wang et al., 2025",
    moves="nothing",
    use_when="a LoRA of rank r at the numbers of rank e",
    cost="the bases are put together from shards in every pass",
)
def mos(r: int = 8, lora_alpha: float = 16, e: int = 2, shards: int = 4, p: int = 1, **overrides: Any) -> Method:
    """MoS: every component is put together from shards of pools for all modules of a type. The authors train all
    linears of 4-bit Llamas with alpha 16; r, e, `shards` and p were not confirmed."""
    options = {"r": r, "lora_alpha": lora_alpha, "bases": Shards(e, shards, p), "core": None}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "edora",
    paper="Nasiri & Garraghan, 2025",
    moves="nothing",
    use_when="DoRA at the numbers of LoRA-XS: r * r + out a module",
    cost="an SVD of each weight at injection; the rows' norms anew in every pass",
)
def edora(r: int = 32, lora_alpha: float = 16, std: float = 1e-5, **overrides: Any) -> Method:
    """EDoRA: LoRA-XS with the norms of the weight's rows trained apart. The authors train RoBERTa-base with r 4 to 32
    and another learning rate for the classifier."""
    return lora_xs(r=r, lora_alpha=lora_alpha, std=std, **{"use_dora": True, **overrides})


@register(
    "lamda",
    paper="Azizi et al., 2024",
    moves="nothing",
    use_when="r * r numbers a module in the end, and activations of r instead of in numbers a token throughout",
    cost="an SVD of each weight at injection; optimizer state for B",
)
def lamda(r: int = 64, lora_alpha: float = 16, until: float = 0.3, **overrides: Any) -> Method:
    """LaMDA: singular vectors around a full core that starts with the singular values, which the base gives up; B
    trains at first and freezes gradually. The exact start was not confirmed; the released code has none of its own and
    leaves the core at a random one."""
    options = {"r": r, "lora_alpha": lora_alpha, "bases": SVD(train_B=True), "core": Full("values", residual="init")}
    options["schedule"] = [FreezeGradually(until)]
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "lamda++",
    paper="Azizi et al., 2024 (how ranks are spread is this project's)",
    moves="nothing; ranks are spread over a block's modules at the start",
    use_when="LaMDA, with more of the same total for weights that r components hold badly",
    cost="LaMDA's, and one more SVD of each weight at injection",
)
def lamda_plus_plus(r: int = 64, multiples: tuple[float, ...] = (0.5, 1.0, 1.5), **overrides: Any) -> Method:
    """LaMDA whose ranks follow from the pretrained spectra, without a pass over data (`SpectrumSpread`). The paper's
    rule beyond that was not confirmed, and the released code has none."""
    return lamda(r=r, **{"bases": SVD(train_B=True, ranks=SpectrumSpread(multiples)), **overrides})


@register(
    "s2-lora",
    paper="Liu et al., 2024 (start, penalty and rates are this project's)",
    moves="rank: each module chooses among components that all modules of its shape share",
    use_when="r numbers a module beside one pair of factors for all of a shape",
    cost="a LoRA's for each pass, the numbers of one module",
)
def s2_lora(r: int = 32, weight: float = 0.1, **overrides: Any) -> Method:
    """S2-LoRA: B diag(e) A with shared, trained A and B and coefficients e that a threshold keeps sparse. `weight`
    times the learning rate is the threshold; below 1, or no coefficient ever leaves its start at 0. Sweep it."""
    bases = SharedBases("AB", across="shape", init="normal")
    options = {"r": r, "bases": bases, "core": Diagonal(), "schedule": [ProximalGate(weight)]}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "intrinsic-dimension",
    paper="Aghajanyan et al., 2021; Li et al., 2018",
    moves="nothing",
    use_when="measuring how few numbers a task needs, or training that few",
    cost="transforms of each weight's size in every pass, forwards and backwards",
)
def intrinsic_dimension(dimension: int = 20_000, structure_aware: bool = True, **overrides: Any) -> Method:
    """SAID, or DID with `structure_aware=False`: all updates are projections of one trained point, which has
    `dimension` numbers less one a weight. The authors train T5-base with 20,000 and lr 3e-2; d90 is the smallest that
    reaches 90 % of full fine-tuning."""
    options = {"bases": Fastfood(dimension, structure_aware), "core": None, "target_modules": "all-linear"}
    return Method(SpectralLoraConfig(**{**options, **overrides}))
