"""Methods that upstream peft ships, by name: rows that return its configs, with this package's rules acting on them.

    methods.get("dora", r=16, schedule=[SampleLayers()])

Options behind a row's own are fields of its config. `schedule` takes rules that act on whole modules (`SampleLayers`,
`AlternateModules`) and, for LoRA and its forms, on components (`Orthogonality`); a config of upstream's cannot hold
them, so they are the callbacks'. Weights that peft itself writes into the base (`pissa`, `lora-ga`) are its own way:
save these with `path_initial_model_for_weight_conversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback

from ..rules import Rule, check_pairs
from ..training import RuleRunner
from ..training.options import upstream_callbacks
from ..tuners.shared.base_weight import keep_4bit_weight_stable
from ..utils.parts import load_part
from .registry import FirstRun, Method, register

Rules = Sequence[Rule | dict[str, Any]]


def upstream_config(name: str, **options: Any) -> PeftConfig:
    """The config class `name` of the installed peft with `options`, on every linear layer unless they say otherwise.

    Raises:
        ValueError: the installed peft has no such class, or another peft than 0.21.2 does not know one of the options.
    """
    config_class = getattr(peft, name, None)
    if config_class is None:
        raise ValueError(
            f"peft {peft.__version__} has no {name}. peft 0.21.2 has it: pip install 'peft>=0.21.2,<0.22'."
        )
    return config_class(**options)


def _method(config_class: str, schedule: Rules, overrides: dict[str, Any], **options: Any) -> Method:
    return upstream_method(config_class, schedule, overrides, **options)


def upstream_method(
    config_class: str,
    schedule: Rules,
    overrides: dict[str, Any],
    own_callback: Callable[[], TrainerCallback] | None = None,
    make_ready: Callable[[nn.Module], object] | None = None,
    **options: Any,
) -> Method:
    """A method that is a config of upstream's, on every linear layer unless `overrides` say otherwise, with the rules
    of `schedule`; perhaps with a callback of its own, and with something to do to the adapted model before there is a
    Trainer."""
    rules = [load_part(Rule, rule, "schedule") for rule in schedule]
    check_pairs(rules)
    config = upstream_config(config_class, **{"target_modules": "all-linear", **options, **overrides})

    def callbacks(model: nn.Module) -> list[TrainerCallback]:
        return [*_callbacks(rules, model), *([] if own_callback is None else [own_callback()])]

    def prepare(model: nn.Module, first_run: FirstRun | None) -> None:
        _keep_4bit_stable(model, first_run)
        if make_ready is not None:
            make_ready(model)

    return Method(config, make_callbacks=callbacks, make_ready=prepare)


def _keep_4bit_stable(model: nn.Module, first_run: FirstRun | None) -> None:
    """Let a 4-bit base on a CPU be evaluated before training: bitsandbytes would repack it, and it cannot be trained
    then. This package's own layers see to it themselves."""
    for module in model.modules():
        keep_4bit_weight_stable(module)


def _callbacks(rules: list[Rule], model: nn.Module) -> list[TrainerCallback]:
    return [*(upstream_callbacks(model) or []), *(RuleRunner(rule) for rule in rules)]


@register(
    "dora",
    paper="Liu et al., 2024",
    moves="nothing",
    use_when="LoRA at a small rank falls behind full fine-tuning",
    cost="the norm of every adapted row at each step",
    upstream="LoraConfig",
)
def dora(r: int = 16, lora_alpha: float = 32, schedule: Rules = (), **overrides: Any) -> Method:
    """Magnitude and direction of every output apart, the direction adapted by LoRA."""
    return _method("LoraConfig", schedule, overrides, r=r, lora_alpha=lora_alpha, use_dora=True)


@register(
    "rslora",
    paper="Kalajdzievski, 2023",
    moves="nothing",
    use_when="LoRA of a high rank",
    cost="none beyond LoRA",
    upstream="LoraConfig",
)
def rslora(r: int = 64, lora_alpha: float = 16, schedule: Rules = (), **overrides: Any) -> Method:
    r"""LoRA scaled by :math:`\alpha / \sqrt{r}`."""
    return _method("LoraConfig", schedule, overrides, r=r, lora_alpha=lora_alpha, use_rslora=True)


@register(
    "pissa",
    paper="Meng et al., 2024",
    moves="nothing",
    use_when="LoRA starts slowly",
    cost="an SVD of every weight at injection; peft writes the rest into the base; dense bases only",
    four_bit=False,
    upstream="LoraConfig",
)
def pissa(r: int = 16, lora_alpha: float = 16, iterations: int = 0, schedule: Rules = (), **overrides: Any) -> Method:
    """LoRA that starts with the weight's largest singular triplets; `iterations` > 0 finds them by a randomised SVD of
    as many subspace iterations (authors: 16)."""
    init = f"pissa_niter_{iterations}" if iterations else "pissa"
    return _method("LoraConfig", schedule, overrides, r=r, lora_alpha=lora_alpha, init_lora_weights=init)


@register(
    "eva",
    paper="Paischer et al., 2024",
    moves="rank: shared out once by the variance that directions of the inputs explain",
    use_when="ranks and directions should follow the task's activations from the first step",
    cost="passes over the data before the first step, until the inputs' directions stand still",
    upstream="LoraConfig",
)
def eva(
    r: int = 16, lora_alpha: float = 1, rho: float = 2.0, tau: float = 0.99, schedule: Rules = (), **overrides: Any
) -> Method:
    """LoRA whose A are the main directions of each layer's inputs; at most `rho * r` components in a module, found to
    the cosine `tau`."""
    eva_config = upstream_config("EvaConfig", rho=rho, tau=tau)
    options = {"r": r, "lora_alpha": lora_alpha, "init_lora_weights": "eva", "eva_config": eva_config}
    return _method("LoraConfig", schedule, overrides, **options)


@register(
    "lora-ga",
    paper="Wang et al., 2024",
    moves="nothing",
    use_when="LoRA should take full fine-tuning's first step",
    cost="dense gradients of all adapted weights first; peft writes the start into the base; dense bases only",
    four_bit=False,
    upstream="LoraConfig",
)
def lora_ga(
    r: int = 8, lora_alpha: float = 16, stable_gamma: int = 16, schedule: Rules = (), **overrides: Any
) -> Method:
    """LoRA that starts with singular vectors of the first gradient, scaled as published (`stable_gamma`, rsLoRA)."""
    config = upstream_config("LoraGAConfig", stable_gamma=stable_gamma)
    options = {"r": r, "lora_alpha": lora_alpha, "use_rslora": True, "init_lora_weights": "lora_ga"}
    return _method("LoraConfig", schedule, overrides, **options, lora_ga_config=config)


@register(
    "adalora-peft",
    paper="Zhang et al., 2023",
    moves="rank: components compete over the whole model",
    use_when="an AdaLoRA that upstream's own classes load",
    cost="two moving averages per low-rank number while it trains",
    upstream="AdaLoraConfig",
)
def adalora_peft(
    init_r: int = 12,
    target_r: int = 8,
    tinit: int = 0,
    tfinal: int = 0,
    every: int = 10,
    schedule: Rules = (),
    **overrides: Any,
) -> Method:
    """Upstream's AdaLoRA; `tinit` and `tfinal` in steps, and `total_step` the run's. `adalora` is the same on this
    package's layers, with fractions of the run."""
    options = {"init_r": init_r, "target_r": target_r, "tinit": tinit, "tfinal": tfinal, "deltaT": every}
    total = max(tinit + tfinal + 1, 1)  # upstream wants one, and the runner writes the run's own
    return _method("AdaLoraConfig", schedule, overrides, **options, total_step=total)


@register(
    "loha",
    paper="Hyeon-Woo et al., 2022",
    moves="nothing",
    use_when="a higher rank is wanted of as many numbers: two factor pairs multiplied entry by entry",
    cost="the dense update of every weight at each step; dense bases only",
    four_bit=False,
    upstream="LoHaConfig",
)
def loha(r: int = 8, alpha: float = 8, schedule: Rules = (), **overrides: Any) -> Method:
    """FedPara's Hadamard product of two low-rank products, rank up to r squared."""
    return _method("LoHaConfig", schedule, overrides, r=r, alpha=alpha)


@register(
    "lokr",
    paper="Yeh et al., 2024",
    moves="nothing",
    use_when="very few numbers, or updates of a block structure",
    cost="the dense update of every weight at each step; dense bases only",
    four_bit=False,
    upstream="LoKrConfig",
)
def lokr(r: int = 8, alpha: float = 8, decompose_factor: int = -1, schedule: Rules = (), **overrides: Any) -> Method:
    """A Kronecker product whose larger factor is low-rank; `decompose_factor` -1: factors near a square."""
    return _method("LoKrConfig", schedule, overrides, r=r, alpha=alpha, decompose_factor=decompose_factor)


@register(
    "hira",
    paper="Huang et al., 2025",
    moves="nothing",
    use_when="an update of full rank from low-rank factors: the weight itself times a low-rank mask",
    cost="the dense product of the factors with every weight at each step",
    upstream="HiraConfig",
)
def hira(r: int = 32, schedule: Rules = (), **overrides: Any) -> Method:
    """The update is the base weight times BA, entry by entry; leaves as a dense model."""
    return _method("HiraConfig", schedule, overrides, r=r)


@register(
    "hut-like",
    paper="after Zhang et al., 2024 (abstract only: the form is this project's guess)",
    moves="nothing",
    use_when="an update that multiplies the weight, and keeps its zeros",
    cost="the dense product of the factors with every weight at each step",
    upstream="HiraConfig",
)
def hut_like(r: int = 8, schedule: Rules = (), **overrides: Any) -> Method:
    r"""A Hadamard-updated weight :math:`W \odot (1 + BA)`, as HiRA's. Of HUT (arXiv 2409.13501) the abstract alone
    could be read: two low-rank matrices and a Hadamard product, fewer FLOPs than LoRA's in training; this form costs
    more, so the paper's figures are not its."""
    return _method("HiraConfig", schedule, overrides, r=r)


@register(
    "miss",
    paper="Kang and Yin, 2024",
    moves="nothing",
    use_when="a cheap step matters most: one matrix, no second factor",
    cost="below LoRA",
    upstream="MissConfig",
)
def miss(r: int = 64, schedule: Rules = (), **overrides: Any) -> Method:
    """One trained shard that is repeated along the inputs (Bone's successor); leaves as a LoRA of rank r, exactly."""
    return _method("MissConfig", schedule, overrides, r=r)


@register(
    "gralora",
    paper="Jung et al., 2025",
    moves="nothing",
    use_when="LoRA of a high rank suffers from outlier channels",
    cost="none beyond LoRA's numbers; k * k small products; dense bases only",
    four_bit=False,
    upstream="GraloraConfig",
)
def gralora(r: int = 32, alpha: float = 64, k: int = 2, schedule: Rules = (), **overrides: Any) -> Method:
    """k by k blocks with a LoRA of rank r/k each (authors: k = 2 up to r = 32, 4 above)."""
    return _method("GraloraConfig", schedule, overrides, r=r, alpha=alpha, gralora_k=k)


@register(
    "randlora",
    paper="Albert et al., 2025",
    moves="nothing",
    use_when="updates of full rank from few numbers; a larger r means fewer of them",
    cost="products with all random bases; these in the file, unless save_projection=False; dense bases only",
    four_bit=False,
    upstream="RandLoraConfig",
)
def randlora(r: int = 32, alpha: float = 640, schedule: Rules = (), **overrides: Any) -> Method:
    """Trained diagonals between random bases that all modules share."""
    return _method("RandLoraConfig", schedule, overrides, r=r, randlora_alpha=alpha)


@register(
    "vb-lora",
    paper="Li et al., 2024",
    moves="which vectors of the bank a factor is mixed of, every forward pass",
    use_when="the file must be tiny: one bank of vectors for the whole model",
    cost="a softmax over the bank for every piece of every factor; dense bases only",
    four_bit=False,
    upstream="VBLoRAConfig",
)
def vb_lora(
    r: int = 4, num_vectors: int = 256, vector_length: int = 256, topk: int = 2, schedule: Rules = (), **overrides: Any
) -> Method:
    """Factors mixed of the `topk` best of a shared bank; `vector_length` must divide every side. The authors train the
    bank at 1e-3 and the mixing logits at 1e-2."""
    options = {"num_vectors": num_vectors, "vector_length": vector_length, "topk": topk}
    return _method("VBLoRAConfig", schedule, overrides, r=r, **options)


@register(
    "ln-tuning",
    paper="Qi et al., 2022",
    moves="nothing",
    use_when="the least that trains at all: the norms",
    cost="none",
    upstream="LNTuningConfig",
)
def ln_tuning(schedule: Rules = (), **overrides: Any) -> Method:
    """Copies of the norms' weights train (peft's defaults name them for each architecture).

    Raises:
        ValueError: `target_modules="all-linear"`; there is nothing linear about a norm.
    """
    if overrides.get("target_modules") == "all-linear":
        raise ValueError(
            "target_modules='all-linear' names no norm, and ln-tuning trains norms. Leave it out (peft knows the norms "
            "of common architectures) or name them, as in ['input_layernorm']."
        )
    return _method("LNTuningConfig", schedule, {"target_modules": None, **overrides})
