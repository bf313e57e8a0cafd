"""Methods for weights that train themselves, without an adapter: an optimizer, and which layers take part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers import TrainingArguments

from ..optim import (
    AdamRSpec,
    BlockProjection,
    ColumnProjection,
    EntryProjection,
    MkorSpec,
    NormScaledResidual,
    OptimizerSpec,
    ProjectedAdamWSpec,
    Projection,
    RandomProjection,
    SignResidual,
    SVDProjection,
)
from ..rules import Cyclic, LargestGradient, Outliers, Rule, SwitchLayers
from ..training import MuonSpec, RuleRunner, trainer_options


@dataclass(frozen=True)
class WholeMethod:
    """A method ready to train: `Trainer(model=model, train_dataset=data, **method.options(model, args))`."""

    optimizer: OptimizerSpec | None = None
    """None: the Trainer's own."""
    rule: Rule | None = None

    def options(self, model: nn.Module, args: TrainingArguments) -> dict[str, Any]:
        """Arguments for a Trainer, as `trainer_options` gives them, the rule's callback among them.

        `model` is any that trains: its own weights, or adapters of peft.
        """
        found = {"args": args, "callbacks": []}
        if self.optimizer is not None:
            found = trainer_options(model, args, optimizer=self.optimizer)
        return {**found, "callbacks": [*found["callbacks"], *([RuleRunner(self.rule)] if self.rule else [])]}


@dataclass(frozen=True)
class WholeMethodInfo:
    """What the table tells about a method before it is built."""

    name: str
    paper: str
    """Authors and year of the source."""
    state: str
    """Numbers that the optimizer keeps of a matrix `[m, n]`, `m <= n`."""
    build: Callable[..., WholeMethod] = field(repr=False)


_METHODS: dict[str, WholeMethodInfo] = {}


def _register(name: str, paper: str, state: str) -> Callable[[Callable[..., WholeMethod]], Callable[..., WholeMethod]]:
    def enter(build: Callable[..., WholeMethod]) -> Callable[..., WholeMethod]:
        _METHODS[name] = WholeMethodInfo(name, paper, state, build)
        return build

    return enter


def whole(name: str, **options: Any) -> WholeMethod:
    """Build the method `name` for whole weights; `options` are its function's here, and behind them any field of its
    optimizer's part.

    Raises:
        ValueError: no such method; the message lists them.
    """
    if name not in _METHODS:
        raise ValueError(f"no method {name!r} for whole weights; choose one of {sorted(_METHODS)}.")
    return _METHODS[name].build(**options)


def whole_names() -> list[str]:
    """Names that `whole` takes."""
    return sorted(_METHODS)


def whole_table() -> str:
    """The methods as docs/optimizers.md shows them."""
    lines = ["| method | source | what it is | numbers of state of `[m, n]`, `m <= n` |", "|---|---|---|---|"]
    for info in (_METHODS[name] for name in whole_names()):
        first = info.build.__doc__.split("\n\n")[0].replace("\n", " ")
        lines.append(f"| `{info.name}` | {info.paper} | {' '.join(first.split())} | {info.state} |")
    return "\n".join(lines)


@_register("galore", "Zhao et al., 2024", "2rn + rm")
def galore(rank: int = 128, every: int = 200, scale: float = 0.25, side: str = "std", **options: Any) -> WholeMethod:
    """Moments in the leading singular vectors of the gradient, the rest of it dropped; `bits=8` and `layerwise=True`
    are the paper's 8-bit and per-layer forms.

    Fine-tuning in the paper: rank 4 or 8, scale 4, every 500. Its class has eps 1e-6."""
    return WholeMethod(ProjectedAdamWSpec(SVDProjection(rank, side), every=every, scale=scale, **options))


@_register("fira", "Chen et al., 2024", "2rn + rm + 1")
def fira(rank: int = 128, every: int = 200, growth: float = 1.01, **options: Any) -> WholeMethod:
    """GaLore with the rest of the gradient too, scaled row by row as Adam scaled the projected one, its growth
    limited."""
    return WholeMethod(ProjectedAdamWSpec(SVDProjection(rank), NormScaledResidual(growth), every=every, **options))


@_register("frugal", "Zmushko et al., 2024", "2dmn, d the density")
def frugal(
    density: float = 0.25,
    every: int = 200,
    projection: Literal["blocks", "columns", "rows", "entries", "random", "svd"] = "blocks",
    rank: int = 128,
    rest: float = 1.0,
    **options: Any,
) -> WholeMethod:
    """Moments in a subspace that is drawn anew, blockwise or of columns, rows, entries or random vectors, and signSGD
    on all else.

    Fine-tuning in the paper: columns, rest 0.1, every 500. `rank` is that of random and singular vectors."""
    made: dict[str, Projection] = {
        "blocks": BlockProjection(density),
        "columns": ColumnProjection(density),
        "rows": ColumnProjection(density, "rows"),
        "entries": EntryProjection(density),
        "random": RandomProjection(rank),
        "svd": SVDProjection(rank),
    }
    if projection not in made:
        raise ValueError(f"frugal(projection={projection!r}): choose one of {list(made)}.")
    spec = ProjectedAdamWSpec(made[projection], SignResidual(rest), every=every, reset_moments=True, **options)
    return WholeMethod(spec)


@_register("gradnormlorp", "Huang et al., 2025", "2rn + rm + 4m")
def gradnormlorp(rank: int = 128, every: int = 250, scale: float = 0.25, **options: Any) -> WholeMethod:
    """Weights as magnitudes and directions of rows: GaLore on the directions, Adam on the magnitudes.

    To fine-tune, the paper does so over a DoRA: LoraConfig(use_dora=True) with `galore(rank=4, every=500, scale=4)`."""
    spec = ProjectedAdamWSpec(SVDProjection(rank), every=every, scale=scale, weight_norm=True, **options)
    return WholeMethod(spec)


@_register("lisa", "Pan et al., 2024", "2mn in the layers that train")
def lisa(layers: int = 2, every: int = 20, moments: str = "reset") -> WholeMethod:
    """A few layers drawn alike train at a time; embeddings and head always."""
    return WholeMethod(rule=SwitchLayers(layers, every, moments))


@_register("owlore", "Li et al., 2024", "2rn + rm in the layers that train")
def owlore(
    layers: int = 5,
    every: int = 50,
    threshold: float = 13.0,
    rank: int = 256,
    refresh: int = 100,
    moments: str = "drop",
    **options: Any,
) -> WholeMethod:
    """Layers drawn by their outliers train at a time, by GaLore.

    The released code keeps the moments of layers that rest, so that all of them have some in the end:
    `moments="keep"`."""
    rule = SwitchLayers(layers, every, moments, choice=Outliers(threshold))
    return WholeMethod(ProjectedAdamWSpec(SVDProjection(rank), every=refresh, **options), rule)


@_register("badam", "Luo et al., 2024", "2mn in the layers that train")
def badam(layers: int = 1, every: int = 50, order: str = "permutation") -> WholeMethod:
    """Layers train in turns (block coordinate descent), with fresh moments; embeddings and head always, which the paper
    takes for blocks too."""
    return WholeMethod(rule=SwitchLayers(layers, every, "drop", choice=Cyclic(order)))


@_register("gauss-southwell", "Nutini et al., 2022", "2mn in the layers that train")
def gauss_southwell(layers: int = 1, every: int = 50, norm: str = "2", samples: int = 16) -> WholeMethod:
    """The layers with the largest gradients train (greedy block coordinate descent), with fresh moments."""
    return WholeMethod(rule=SwitchLayers(layers, every, "drop", choice=LargestGradient(norm, samples)))


@_register("muon", "Jordan et al., 2024", "mn")
def muon(**options: Any) -> WholeMethod:
    """Orthogonalised momentum for matrices, AdamW for embeddings, head and vectors."""
    return WholeMethod(MuonSpec(**options))


@_register("mkor", "Mozaffari et al., 2023", "2mn + mm + nn")
def mkor(every: int = 10, **options: Any) -> WholeMethod:
    """AdamW of gradients that rank-one inverse factors of the layers' inputs and output gradients precondition."""
    return WholeMethod(MkorSpec(every, **options))


@_register("adamr", "Deng et al., 2025 (DAREx)", "3mn")
def adamr(norm: str = "l2", **options: Any) -> WholeMethod:
    """A pull to the pretrained weights, the stronger the smaller gradients are, so that DARE can drop most of the
    change; its strength is `weight_decay` (released: 1e-4)."""
    return WholeMethod(AdamRSpec(norm, **options))
