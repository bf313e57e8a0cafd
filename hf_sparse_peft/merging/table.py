"""The table of merge methods by name: which parts a paper's method is made of, and where it comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from .competition import Competition
from .consensus import Agreeing, AgreeingWeights, AllWeights, ByImportance, ElectedSign
from .rank_clusters import RankClusters
from .rescale import ByProbability, ByQ, DareK
from .row import Merge, MergeMethod
from .sparsify import Band, DropByRank, DropRandom, TopFraction


@dataclass(frozen=True)
class MergeInfo:
    """What the table tells about a method."""

    name: str
    paper: str
    """Authors and year of the source."""
    does: str
    """One line."""
    result: str
    """What comes out: exact, or which error is measured."""
    build: Callable[..., MergeMethod] = field(repr=False)


_ROWS: dict[str, MergeInfo] = {}


def register_merge(name: str, *, paper: str, does: str, result: str) -> Callable[[Callable], Callable]:
    """Decorator: enter a function that builds a `MergeMethod` under `name`; its keyword arguments are the method's
    options.

    Raises:
        ValueError: the name is taken or is not lower case with dashes.
    """
    if name in _ROWS:
        raise ValueError(f"merge method {name!r} is taken by {_ROWS[name].build.__module__}; choose another name.")
    if name != name.lower() or "_" in name or " " in name:
        raise ValueError(f"merge method {name!r} must be lower case with dashes, as in 'lora-lego'.")

    def enter(build: Callable[..., MergeMethod]) -> Callable[..., MergeMethod]:
        _ROWS[name] = MergeInfo(name, paper, does, result, build)
        return build

    return enter


def merge_names() -> list[str]:
    """Names of all methods."""
    return sorted(_ROWS)


def merge_info(name: str) -> MergeInfo:
    """What the table tells about a method.

    Raises:
        ValueError: no such method; lists them.
    """
    if name not in _ROWS:
        raise ValueError(f"method={name!r} is unknown; choose one of {merge_names()}.")
    return _ROWS[name]


def get_merge(name: str, **options: Any) -> MergeMethod:
    """The method `name`; `options` are its own and, behind them, those of the class that it builds (`Merge`).

    Raises:
        ValueError: no such method, or an option that it does not have.
    """
    build = merge_info(name).build
    parameters = inspect.signature(build).parameters.values()
    known = {one.name for one in parameters if one.kind != one.VAR_KEYWORD}
    if any(one.kind == one.VAR_KEYWORD for one in parameters):
        kind = inspect.signature(build, eval_str=True).return_annotation
        known |= {one.name for one in fields(kind if is_dataclass(kind) else Merge)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"merge method {name!r} has no option {unknown}; it takes {sorted(known)}.")
    return build(**options)


def merges_markdown() -> str:
    """The table as docs/merging.md shows it."""
    lines = ["| method | source | what it does | result |", "|---|---|---|---|"]
    lines += [f"| `{one.name}` | {one.paper} | {one.does} | {one.result} |" for _, one in sorted(_ROWS.items())]
    return "\n".join(lines)


_SUM = "exact: supports add on their union, ranks add up"
_ENTRIES = "entries exact; low-rank halves by SVD, error measured"


@register_merge(
    "sum",
    paper="Ilharco et al., 2023 (task arithmetic)",
    does="the weighted sum of the updates; negative weights subtract",
    result=_SUM,
)
def weighted_sum(**overrides: Any) -> Merge:
    """Task arithmetic."""
    return Merge(**overrides)


@register_merge(
    "lt-sft-composition",
    paper="Ansell et al., 2022 (LT-SFT)",
    does="a language's and a task's sparse updates, added as they are",
    result=_SUM,
)
def lt_sft(**overrides: Any) -> Merge:
    """Composition of sparse fine-tunings: added, unscaled."""
    return Merge(**overrides)


@register_merge(
    "cape",
    paper="Choubey et al., 2023 (CaPE)",
    does="base adapter + alpha x (expert - anti-expert), in this order",
    result=_SUM,
)
def cape(alpha: float = 0.6, **overrides: Any) -> Merge:
    """Contrastive parameter ensembling; expert and anti-expert were trained on from the base adapter."""
    return Merge(**{"weights": (1.0, alpha, -alpha), **overrides})


@register_merge(
    "soup",
    paper="Wortsman et al., 2022 (model soups)",
    does="the weighted mean; `same_support=true` refuses other supports (sparse soups); `greedy_soup` chooses",
    result=_SUM,
)
def soup(**overrides: Any) -> Merge:
    """The mean of the models; what one adapter does not hold is 0 there."""
    return Merge(**{"normalise": AllWeights(), **overrides})


@register_merge(
    "ties",
    paper="Yadav et al., 2023 (TIES)",
    does="the largest fifth of each, a vote on the sign, the mean of those that agree",
    result=_ENTRIES,
)
def ties(
    density: float = 0.2,
    scope: Literal["global", "tensor"] = "global",
    count: Literal["exact", "code"] = "exact",
    tie: Literal["majority", "plus", "minus"] = "majority",
    weighted: bool = False,
    **overrides: Any,
) -> Merge:
    """TIES; with `weighted` votes and divisor have the adapters' weights, as in mergekit."""
    parts = {
        "sparsify": TopFraction(density, scope, count),
        "consensus": ElectedSign(weighted=weighted, tie=tie),
        "normalise": AgreeingWeights() if weighted else Agreeing(),
    }
    return Merge(**{**parts, **overrides})


@register_merge(
    "dare",
    paper="Yu et al., 2024 (DARE)",
    does="drops entries at random and scales the others up; then the sum, or `consensus=elected_sign`, "
    "`normalise=agreeing`",
    result=_ENTRIES,
)
def dare(rate: float = 0.9, rescale: Any = "by_probability", **overrides: Any) -> Merge:
    """DARE with task arithmetic; `rescale="by_norm"` is mergekit's."""
    return Merge(**{"sparsify": DropRandom(rate), "rescale": rescale, **overrides})


@register_merge(
    "darex-q",
    paper="Deng et al., 2025 (DAREx)",
    does="DARE with 1 / q for 1 / (1 - p): q from `find_q` by a measure, or `analytic_q` by inputs",
    result=_ENTRIES,
)
def darex_q(q: float, rate: float = 0.9, layers: dict[str, float] | None = None, **overrides: Any) -> Merge:
    """DAREx-q, with one q or one for each module."""
    return Merge(**{"sparsify": DropRandom(rate), "rescale": ByQ(q, layers or {}), **overrides})


@register_merge(
    "darex-l2",
    paper="Deng et al., 2025 (DAREx)",
    does='DARE of adapters that were trained by `AdamRSpec` (decay towards their start; start="zero" for supports), so '
    "that their values are small enough for high rates",
    result=_ENTRIES,
)
def darex_l2(rate: float = 0.99, **overrides: Any) -> Merge:
    """DARE at a high rate: the other half of DAREx-L2 is the optimizer that adapters are trained by, `optim.AdamR`."""
    return dare(rate=rate, **overrides)


@register_merge(
    "dare-k",
    paper="Tang et al., 2024 (unified view)",
    does="DARE where dropped entries keep a share k",
    result=_ENTRIES,
)
def dare_k(k: float = 0.5, rate: float = 0.5, **overrides: Any) -> Merge:
    """DARE-k of the unified view of delta editing: k = 0 is DARE, k = 1 the sum."""
    return Merge(**{"sparsify": DropRandom(rate), "rescale": DareK(k), **overrides})


@register_merge(
    "della",
    paper="Deep et al., 2024 (DELLA)",
    does="drops small entries with a higher probability than large ones, each scaled by its own; then elects signs",
    result=_ENTRIES,
)
def della(density: float = 0.7, epsilon: float = 0.07, rescale: Any = "by_probability", **overrides: Any) -> Merge:
    """DELLA: MagPrune, election and weighted mean of those that agree; `rescale="by_norm"` is mergekit's."""
    parts = {
        "sparsify": DropByRank(density, epsilon),
        "rescale": rescale,
        "consensus": ElectedSign(weighted=True, tie="plus"),
        "normalise": AgreeingWeights(),
    }
    return Merge(**{**parts, **overrides})


@register_merge(
    "magprune",
    paper="Deep et al., 2024 (DELLA)",
    does="DELLA's dropping alone, then the sum",
    result=_ENTRIES,
)
def magprune(density: float = 0.7, epsilon: float = 0.07, **overrides: Any) -> Merge:
    """MagPrune with task arithmetic."""
    return Merge(**{"sparsify": DropByRank(density, epsilon), "rescale": ByProbability(), **overrides})


@register_merge(
    "breadcrumbs",
    paper="Davari and Belilovsky, 2024 (Model Breadcrumbs)",
    does="drops each row's largest and its small entries, then the scaled sum",
    result=_ENTRIES,
)
def breadcrumbs(keep: float = 0.15, outliers: float = 0.006, scale: float = 0.2, **overrides: Any) -> Merge:
    """Model Breadcrumbs at the start of the authors' search."""
    return Merge(**{"sparsify": Band(keep, outliers), "scale": scale, **overrides})


@register_merge(
    "pcb",
    paper="Du et al., 2024 (PCB-Merging)",
    does="entries compete within and between adapters; the mean by their scores",
    result=_ENTRIES,
)
def pcb(
    ratio: float = 0.1, scale: float = 1.2, between: Literal["raw", "normalised"] = "raw", **overrides: Any
) -> Merge:
    """PCB-Merging; `scale` is the authors' lambda."""
    parts = {"consensus": Competition(ratio, between=between), "normalise": Agreeing(), "scale": scale}
    return Merge(**{**parts, **overrides})


@register_merge(
    "fisher",
    paper="Matena and Raffel, 2022",
    does="the mean by the Fisher information of each entry (`fisher_importance`)",
    result=_ENTRIES,
)
def fisher(normalise_importance: bool = True, **overrides: Any) -> Merge:
    """Fisher-weighted averaging; needs `importance`."""
    parts = {"consensus": ByImportance(normalise_importance), "normalise": AgreeingWeights()}
    return Merge(**{**parts, **overrides})


@register_merge(
    "lora-lego",
    paper="Zhao et al., 2025 (LoRA-LEGO)",
    does="components of low-rank adapters clustered; each cluster is one component of the result",
    result="of rank k; exact (the sum) with as many clusters as components",
)
def lora_lego(clusters: int | None = None, **overrides: Any) -> RankClusters:
    """LoRA-LEGO."""
    return RankClusters(clusters, **overrides)
