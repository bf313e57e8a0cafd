"""Supports that stay as they were chosen: at random, by the weights, by data, by a search, by another run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..hub.analysis import support_from_checkpoints
from ..rules import (
    L1Penalty,
    SearchSupport,
)
from ..sparsity import (
    DeltaMagnitude,
    Density,
    ErdosRenyi,
    Fisher,
    Global,
    Numbers,
    Proportional,
    RankEquivalent,
    UnitsPerModule,
    WholeTensors,
)
from ..tuners import SparseLoraConfig
from .registry import FirstRun, Method, register, row, with_overrides


@register(
    "shira",
    paper="Bhardwaj et al., 2024",
    moves="nothing",
    use_when="a fixed random support is enough, or as the baseline for everything that chooses",
    cost="none",
)
def shira(density: float = 0.01, **overrides: Any) -> Method:
    """SHiRA's random mask, with a draw of its own for every layer (upstream draws one per shape)."""
    options = {"r": 0, "density": density, "criterion": "random", "target_modules": "all-linear"}
    return row(overrides, **options)


@register(
    "super-tuning",
    paper="Super-Tuning (arXiv:2607.09287)",
    moves="nothing",
    use_when="a fixed support without data, on the largest weights",
    cost="one pass over each weight at injection",
)
def super_tuning(density: float = 0.01, r: int = 0, **overrides: Any) -> Method:
    """The largest weights as the support; `r > 0` adds the low-rank half of the paper's hybrid."""
    options = {"r": r, "density": density, "criterion": "magnitude", "target_modules": "all-linear"}
    return row(overrides, **options)


@register(
    "paca",
    paper="Woo et al., 2025",
    moves="nothing",
    use_when="a step cheaper than LoRA's: r random columns of each weight, which leave as a LoRA of rank r",
    cost="none; keeps only the chosen columns of the input for the backward pass",
    claim="22 % less time and 16 % less memory than LoRA (abstract)",
)
def paca(r: int = 8, lora_alpha: float = 8, **overrides: Any) -> Method:
    """PaCA: r columns of each weight, drawn from the seed and the module's name, as changes from 0 that are multiplied
    by `lora_alpha / r`, which under Adam multiplies their learning rate and does nothing else. The official code writes
    into the base, at every other forward pass without accumulation, and draws from the global generator. The authors
    train 8B and 70B with r 64 and lr 5e-3."""
    options = {"budget": UnitsPerModule(r), "scale_support": lora_alpha / r, "target_modules": "all-linear"}
    return row(overrides, r=0, granularity="column", criterion="random", **options)


@register(
    "fish",
    paper="Sung et al., 2021",
    moves="nothing",
    use_when="a fixed support is wanted, and labelled examples can say which entries the loss depends on",
    cost="one backward pass for each of 1024 examples before training; 4 bytes a targeted entry, or more passes",
)
def fish(density: float = 0.005, examples: int = 1024, mode: str = "square", **overrides: Any) -> Method:
    """FISH mask: the entries with the largest empirical Fisher information over the whole model, fixed for the run.

    The numbers of `modules_to_save` (the classifier) train in full and are paid out of the budget, as published. Two
    departures: the paper ranks biases, norms and embeddings too, here the targeted weights compete, and `density` is a
    fraction of those; and every module keeps at least its best entry.
    """
    criterion = overrides.get("criterion", Fisher(examples=examples, mode=mode))
    entries = overrides.get("granularity", "entry") == "entry" and isinstance(criterion, Fisher)
    options = {"r": 0, "budget": Global(density, pay_head=entries), "criterion": criterion}
    return row(overrides, **options, target_modules="all-linear")


@register(
    "lt-sft",
    paper="Ansell et al., 2022",
    moves="nothing",
    use_when="adapters are to be added to each other; the support is what a dense warm-up moved farthest",
    cost="a dense warm-up before training: 16 bytes a targeted entry while it lasts",
)
def lt_sft(
    density: float = 0.01,
    warmup_steps: int = 100,
    warmup_lr: float = 5e-5,
    warmup_l1: float = 0.0,
    l1: float = 0.0,
    n_iterations: int = 1,
    sparse_steps: int | None = None,
    **overrides: Any,
) -> Method:
    """Lottery-ticket sparse fine-tuning: train everything, keep the largest changes' places, rewind, train those.

    The Trainer's run is the second phase, with an optimizer of its own; use no weight decay. Adapters add up:
    `add_weighted_adapter([task, language], [1.0, 1.0], name, "linear")`. `warmup_l1` and `l1` are the two phases' pulls
    to the start (0.1 both for languages in the paper, 0 for tasks). `model.compact()` drops changes within 1e-7 of 0.
    With `n_iterations` above 1 each warm-up chooses a part of the budget and `sparse_steps` steps of sparse training
    (None: `warmup_steps`) come between two, as in the released code; the run starts from the values these reached.
    LayerNorms and biases stay as they are unless `bias` says otherwise.
    """
    warmup = DeltaMagnitude(
        warmup_steps=warmup_steps,
        warmup_lr=warmup_lr,
        l1=warmup_l1,
        n_iterations=n_iterations,
        sparse_steps=sparse_steps,
    )
    options = {"budget": Global(density), "criterion": warmup}
    options = {"schedule": [L1Penalty(weight=l1)] if l1 else [], "compact_tolerance": 1e-7, **options}
    options = with_overrides({"r": 0, "target_modules": "all-linear", **options}, overrides)
    return Method(SparseLoraConfig(**options))


@register(
    "rl-subnetwork",
    paper="Mukherjee et al., 2025",
    moves="nothing",
    use_when="a finished run's update was sparse and is to be repeated or inspected as an adapter",
    cost="two checkpoints, read tensor by tensor; about 20 bytes a changed entry while it trains",
)
def rl_subnetwork(
    before: str | Path | None = None, after: str | Path | None = None, atol: float = 0.0, **overrides: Any
) -> Method:
    """Train only the entries that differ between two checkpoints, by more than `atol`.

    `method.prepare(model)` reads them from the folders or safetensors files `before` and `after`; without those,
    `method.prepare(model, first_run)` makes them by a run of its own. `measure_update_sparsity` says beforehand how
    many entries there will be, `measure_mask_overlap` whether two runs agree on them.
    """
    if (before is None) != (after is None):
        raise ValueError(f"before={before!r} and after={after!r} are two checkpoints of one model: give both or none.")
    options = {"r": 0, "criterion": "given", "target_modules": "all-linear", **overrides}
    ready = partial(_take_subnetwork, before, after, atol)
    return Method(SparseLoraConfig(**options), make_ready=ready)


def _take_subnetwork(before: Any, after: Any, atol: float, model: nn.Module, first_run: FirstRun | None) -> None:
    if before is None and first_run is None:
        raise ValueError(
            "Method 'rl-subnetwork' trains what another run changed. Name that run's checkpoints, methods.get("
            "'rl-subnetwork', before=..., after=...), or pass method.prepare(model, first_run=...)."
        )
    if before is None:
        before, after = first_run()
    support_from_checkpoints(model, before, after, atol=atol)


@register(
    "essential-sparsity",
    paper="Jaiswal et al., 2023",
    moves="nothing",
    use_when="essential_sparsity(model, evaluate) first finds the sparsity that costs the model nothing",
    cost="one evaluation a swept sparsity; the adapter has s* of all entries, which is many",
)
def essential_sparsity_support(sparsity: float = 0.1, **overrides: Any) -> Method:
    """Train exactly the entries that global one-shot magnitude pruning at `sparsity` would remove: those are free for
    the task, and every weight that the model needs stays as it is.

    The paper's own fine-tuning is the other half: the kept weights train and the removed ones stay 0. That is
    `SparseLoraConfig(r=0, criterion="magnitude", budget=Global(1 - s))` inside
    `with one_shot_pruned(model, s):`.

    Args:
        sparsity: take `essential_sparsity(model, evaluate).drop_point`; the default is the smallest sparsity the paper
            sweeps.
    """
    if not 0 < sparsity < 1:
        raise ValueError(
            f"sparsity={sparsity} is not a fraction in (0, 1). Take essential_sparsity(model, evaluate).drop_point; at "
            "0 the model misses every weight, and no entry is free."
        )
    options = {"r": 0, "budget": Global(sparsity), "criterion": "smallest_magnitude", "target_modules": "all-linear"}
    return row(overrides, **options)


@register(
    "random-search",
    paper="Bergstra and Bengio, 2012",
    moves="nothing",
    use_when="as the baseline of criteria that read data: as many passes over it, and random supports",
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
    return row(overrides, **options)


@register(
    "random-pruning",
    paper="Liu et al., 2022",
    moves="nothing",
    use_when="a random support with Erdos-Renyi layer densities, the baseline of sparse training",
    cost="none",
)
def random_pruning(density: float = 0.01, **overrides: Any) -> Method:
    """A fixed random support whose layer densities follow Erdos-Renyi; exact counts where the code draws Bernoulli."""
    options = {"r": 0, "budget": ErdosRenyi(density), "criterion": "random"}
    return row(overrides, **options, target_modules="all-linear")


@register(
    "apet",
    paper="Su et al., 2023",
    moves="nothing",
    use_when="as the baseline of where to train: tensors at random places, as many numbers as another method trains",
    cost="none",
)
def apet(
    budget: int | None = None,
    unit: str = "tensor",
    density: float | None = None,
    budget_rank: int = 8,
    r: int | None = None,
    **overrides: Any,
) -> Method:
    """APET: tensors at arbitrary places train in full until `budget` numbers are spent (arXiv:2306.02320).

    `unit="tensor"`, the released rule: half of the budget goes through the pairs of low-rank factors (rank `r`, by
    default `budget_rank`) in a random order, half through the weight matrices; what still fits into its half
    trains, what does not is skipped. Two departures: a tensor never overshoots its half (the released code compares a
    pair's first factor alone), and norms and biases, which it draws from too, stay as they are. `r=0` spends all on
    matrices. Without `budget` it is `density` of the weights, or the numbers of a LoRA of rank `budget_rank`.

    `unit="entry"`, the authors' random mask: a fixed random support over all matrices in proportion to their sizes, of
    exactly `budget` entries or `density` (0.01) of them.
    """
    if unit not in ("tensor", "entry"):
        raise ValueError(f"unit={unit!r} is unknown; choose 'tensor' (whole tensors) or 'entry' (a random mask).")
    if unit == "tensor":
        total = Numbers(budget) if budget else Density(density) if density else RankEquivalent(budget_rank)
        options = {"r": budget_rank if r is None else r, "budget": WholeTensors(total), "granularity": "row"}
    else:
        total = Numbers(budget) if budget else Density(0.01 if density is None else density)
        options = {"r": r or 0, "criterion": "random", "budget": Proportional(total)}
    return row(overrides, **options, target_modules="all-linear")
