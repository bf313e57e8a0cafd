"""Supports that change while they train: units leave, enter, retire or freeze."""

from __future__ import annotations

from typing import Any

from ..rules import (
    SM3,
    AccumulatedGradient,
    Freeze,
    Gradient,
    LowRankMagnitude,
    NuclearNorm,
    Prune,
    Random,
    RandomUnfired,
    Regrow,
    RelocateSubnets,
)
from ..sparsity import (
    BelowThreshold,
    Cosine,
    Curve,
    ErdosRenyi,
    Linear,
    RankEquivalent,
    scores,
)
from ..training import AgedAdamWSpec, SparseSM3Spec
from .registry import Method, register, row


@register(
    "gradual-pruning",
    paper="Zhu and Gupta, 2017",
    moves="support: thins out along a cubic curve",
    use_when="the final adapter must be small and a larger one helps to find it",
    cost="starts at twice the final numbers",
)
def gradual_pruning(density: float = 0.01, final_fraction: float = 0.5, **overrides: Any) -> Method:
    """Gradual magnitude pruning of the delta: `density` at first, `final_fraction * density` at the end."""
    options = {"r": 0, "density": density, "schedule": [Prune(final_fraction=final_fraction)]}
    return row(overrides, **options, target_modules="all-linear")


@register(
    "spiel-ag",
    paper="Ansell et al., 2024",
    moves="support: drop by magnitude, grow by accumulated gradient",
    use_when="which entries matter is unknown and the run is long enough to find out",
    cost="a dense gradient of one layer at a time in 5 of 20 steps; ages, 2 bytes an entry",
)
def spiel_ag(
    density: float = 0.01,
    every: int = 20,
    steps: int = 5,
    fraction: Curve | float = Linear(0.2, 0.0),
    **overrides: Any,
) -> Method:
    """SpIEL with accumulated gradients: a random start, replaced whole at the first move, then a falling fraction.

    A support that was chosen otherwise, or trained before, is kept at the first move. With
    `fraction=Cosine(0.2, 0.0)` nothing is replaced whole, as in the released code. `density` is a fraction of the
    adapted weights, where the released code's is one of all parameters; `budget=Numbers(n)` gives the number itself
    (the paper: as many as a LoRA has, `RankEquivalent(r)` per matrix).
    """
    move = Regrow(every=every, grow=AccumulatedGradient(steps=steps), fraction=fraction)
    options = {"r": 0, "density": density, "schedule": [move], "target_modules": "all-linear"}
    return row(overrides, **options, optimizer=AgedAdamWSpec())


@register(
    "spiel-ma",
    paper="Ansell et al., 2024",
    moves="support: drop by magnitude, grow by SM3's row x column accumulators",
    use_when="as spiel-ag where optimizer state or dense gradients do not fit; wants learning rates of 4e-4 to 2e-3",
    cost="m + n numbers of optimizer state a matrix; no dense gradient ever",
)
def spiel_ma(
    density: float = 0.01,
    every: int = 20,
    first: int | None = None,
    fraction: Curve | float = Linear(0.2, 0.0),
    score: str = "product",
    momentum: float = 0.0,
    **overrides: Any,
) -> Method:
    """SpIEL with momentum approximation: moves at spiel-ag's steps, the first one after step `first` (5, or `every`
    where that is less).

    `score` 'product' is the paper's; 'min' ranks by SM3's own estimate.
    """
    move = Regrow(every=every, first=first, fraction=fraction, grow=SM3(score))
    options = {"r": 0, "density": density, "schedule": [move], "target_modules": "all-linear"}
    return row(overrides, **options, optimizer=SparseSM3Spec(momentum=momentum))


@register(
    "set",
    paper="Mocanu et al., 2018",
    moves="support: drop by magnitude among each sign, grow at random",
    use_when="the cheapest way to move: no gradient is looked at",
    cost="none beyond the moves; ages, 2 bytes an entry",
)
def sparse_evolutionary_training(
    density: float = 0.01,
    every: int = 100,
    fraction: Curve | float = 0.3,
    drop: str = "signed_magnitude",
    unfired: bool = False,
    **overrides: Any,
) -> Method:
    """SET on the delta: of the positive and of the negative entries the same fraction leaves, those closest to 0;
    random entries enter.

    The paper moves once per epoch: set `every` to the steps of one. `drop="magnitude"` ranks both signs together.
    `unfired` grows entries first that were never in the support.
    """
    move = Regrow(every=every, fraction=fraction, drop=drop, grow=RandomUnfired() if unfired else Random())
    options = {"r": 0, "budget": ErdosRenyi(density), "schedule": [move]}
    return row(overrides, **options, target_modules="all-linear", optimizer=AgedAdamWSpec())


@register(
    "rigl",
    paper="Evci et al., 2020",
    moves="support: drop by magnitude, grow by the gradient of one step",
    use_when="moves are rare and one step's gradient is telling, i.e. batches are large",
    cost="a dense gradient of one layer at a time at each move (with accumulation: of all layers at once)",
)
def rigl(
    density: float = 0.01,
    every: int = 100,
    fraction: Curve | float = Cosine(0.3, 0.0),
    stop_at: float = 0.75,
    first: int | None = None,
    **overrides: Any,
) -> Method:
    r"""RigL on the delta: every `every` steps until `stop_at`, in place of that step's update, a fraction of
    :math:`\frac{\alpha}{2}(1+\cos(\pi t/T_{end}))` moves from the smallest |delta| to the largest |gradient|.

    The released code's defaults differ from the paper's: a constant `fraction=0.1`, and a first move in place of the
    very first update, `first=1`.
    """
    move = Regrow(
        every=every, fraction=fraction, stop_at=stop_at, first=first, grow=Gradient(), in_place_of_update=True
    )
    options = {"r": 0, "budget": ErdosRenyi(density), "schedule": [move]}
    return row(overrides, **options, target_modules="all-linear", optimizer=AgedAdamWSpec())


@register(
    "lift",
    paper="Liu et al., 2025",
    moves="support: the largest entries of the current weight's low-rank approximation, chosen anew",
    use_when="full fine-tuning would be right and does not fit",
    cost="an SVD of every matrix at each move; retired entries take as much memory as trained ones",
)
def lift(
    budget_rank: int = 128,
    filter_rank: int = 128,
    every: int = 200,
    density: float | None = None,
    exact: bool = False,
    retired: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    per_unit_age: bool = False,
    **overrides: Any,
) -> Method:
    r"""Train the `K` largest entries of :math:`|W_q|` in each matrix and choose them anew every `every` steps.

    `K` is that of a LoRA of `budget_rank`, or `density`'s. Entries that leave keep what they learned (retired, within
    `retired`); survivors keep their moments, newcomers start at zero moments. As published the step counter is
    one per matrix, so a newcomer's first step is :math:`(1-\beta_1)/\sqrt{1-\beta_2}` of the learning rate (0.45 with
    these betas); `per_unit_age` corrects each entry's bias instead. `exact` takes full SVDs, as the released code does
    unless told otherwise, instead of randomised ones. The published weight decay is 0, `TrainingArguments`' default.
    """
    approximation = {"rank": filter_rank, "exact": exact}
    move = Regrow(every=every, drop=None, grow=LowRankMagnitude(**approximation), retired=retired)
    budget = {"budget": RankEquivalent(budget_rank)} if density is None else {"density": density}
    start = {"criterion": scores.LowRankMagnitude(**approximation)}
    options = {"r": 0, **budget, **start, "schedule": [move], "target_modules": "all-linear"}
    optimizer = AgedAdamWSpec(betas=tuple(betas), per_unit_age=per_unit_age)
    return row(overrides, **options, optimizer=optimizer)


@register(
    "losia",
    paper="Wang et al., 2025",
    moves="subnet: rows and columns of one transformer layer at a time, by the smoothed sensitivity of its weights",
    use_when="updates of high rank are wanted at the memory of activations of a small subnet, in a long run",
    cost="a dense fp32 accumulator of every adapted matrix; of one layer at a time dense gradients and two fp32 scores",
    claim="27 % less time than LoRA (abstract)",
)
def losia(
    every: int = 100,
    share: float = 0.125,
    importance: str = "mix",
    asynchronous: bool = True,
    rate: str = "cosine_restarts",
    refined: bool = False,
    record: int | None = None,
    **overrides: Any,
) -> Method:
    r"""LoSiA(-Pro): `share` of the rows x `share` of the columns of each matrix, random at first, trained as one dense
    matrix; the `L` layers move theirs in turns of `every` steps (`RelocateSubnets`), each once in `L * every`.

    What was learned at rows and columns that a subnet leaves stays: it is added to a dense fp32 accumulator beside the
    base weight. So the adapter's change has high rank and, after m moves of a matrix, up to
    :math:`1 - (1 - p^2)^{m+1}` of its entries; it leaves as a merged model or as entries (SHiRA), as plain LoRA only
    before the first move. The rate is the paper's own schedule from the run's base rate (5e-5; 2e-4 for short tasks);
    `rate="rewarm"` takes the run's. `asynchronous=False` moves all layers at once, `record=20` reads the last 20 steps
    of a turn only. Heads train through `modules_to_save`. The published Adam has epsilon 1e-6:
    `TrainingArguments(adam_epsilon=1e-6)`.
    """
    move = RelocateSubnets(every, importance, record=record, asynchronous=asynchronous, refined=refined, rate=rate)
    options = {"r": 0, "granularity": "subnet", "subnet_shares": (share, share), "schedule": [move]}
    return row(overrides, **options, target_modules="all-linear")


@register(
    "sara",
    paper="Hu et al., 2025",
    moves="nothing; entries above a threshold freeze at mid-training",
    use_when="preserving pre-trained behaviour matters: only the smallest weights train",
    cost="an SVD of one matrix at every step; half-way one look at each weight",
)
def sara(
    density: float = 0.1,
    threshold: float | None = None,
    nuclear_weight: float = 5e-4,
    at: float = 0.5,
    min_side: int = 64,
    **overrides: Any,
) -> Method:
    r"""Train the smallest entries of each matrix, pulled to low rank; those that outgrow the threshold freeze half-way.

    Without `threshold` each matrix gets its smallest `density` of entries, and its threshold is the largest of them
    (the smallest weight beside 0 where they are all 0, as on NF4, of whose weights 9 % are);
    with it, all entries with :math:`|w| < \tau` (SaRA: 2e-3), whose number follows from the weights and is written to
    the config. SaRA's learning rate is :math:`10^{-3} e^{-350\tau}`. `nuclear_weight=0` leaves the norm out. Deltas are
    trained, so weight decay (SaRA: 0.01) pulls to the pretrained weights, where the official code's pulls to 0.
    """
    budget = {"density": density}
    if threshold is not None:
        budget = {"budget": BelowThreshold(threshold)}
    schedule = [NuclearNorm(weight=nuclear_weight, min_side=min_side)] if nuclear_weight else []
    schedule.append(Freeze(at=at, threshold=threshold))
    options = {
        "r": 0, **budget, "criterion": "smallest_magnitude", "schedule": schedule,
        "target_modules": "all-linear",
    }  # fmt: skip
    return row(overrides, **options)
