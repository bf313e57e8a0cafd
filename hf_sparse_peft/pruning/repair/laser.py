"""LASER: some weight matrices of a base are replaced by approximations of very low rank, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ...sparsity.decomposition import truncated_svd
from ...tuners.shared.layer import AdapterLayer
from ...tuners.shared.quantised import backend_of
from ..units.structure import structures_of

Role = Literal["query", "key", "value", "output", "gate", "up", "down"]
Matrices = Literal["query", "key", "value", "output", "gate", "up", "down", "attention", "mlp", "all"]
_GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
    "all": get_args(Role),
}
FRACTIONS = (0.5, 0.25, 0.1, 0.05, 0.01)


@dataclass(frozen=True)
class LaserEdit:
    """One intervention: which matrices of which block keep how much of their rank."""

    layer: int | None
    """Number of the block, from 0; None: all."""
    matrices: str
    """A role in the block, or "attention", "mlp", "all"."""
    fraction: float
    """Of the smaller side, the rank that is kept."""


@torch.no_grad()
def laser(
    model: nn.Module,
    layer: int | None,
    matrices: Matrices,
    fraction: float,
    *,
    randomized: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    r"""Replace weights by their approximation of rank :math:`\lfloor \rho \min(m, n) \rfloor`, in place and for good
    (LASER; Sharma et al., 2024). With a fraction that rounds to 0 a weight becomes 0, as published.

    Late MLP input matrices at a fraction of 0.01 to 0.1 are what the authors found to help; early layers and attention
    hurt. The dense weight is written: a form that keeps the two factors alone is
    `FactoredConfig(form=LowRank(trained=""), rank=SideFraction(fraction), target_modules=[...])`.

    Args:
        model: a dense decoder or encoder that `structures_of` knows.
        layer: number of the block, from 0; negative ones count from the end; None: all.
        matrices: a role in the block ("query", "key", "value", "output", "gate", "up", "down"), or "attention", "mlp",
            "all". Where one layer holds several of them it is approximated as one matrix.
        fraction: :math:`\rho`, in [0, 1].
        randomized: the randomised SVD of the official code (two power iterations) in place of the exact one.
        seed: of the randomised SVD.

    Returns:
        By module name, the relative error :math:`\|W - W_k\|_F / \|W\|_F`.

    Raises:
        ValueError: an argument out of range; a weight that is quantised, adapted or shared: nothing was touched.
    """
    _check_fraction(fraction)
    weights = _weights(model, layer, matrices)
    found = {}
    for name, module in weights.items():
        weight = _matrix(module)
        rank = int(fraction * min(weight.shape))
        if randomized and rank:
            U, S, Vh = truncated_svd(weight.float(), rank, iterations=2, seed=seed, exact_side=0)
        else:
            U, S, Vh = torch.linalg.svd(_wide(weight), full_matrices=False)
        approximation = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        error = (weight - approximation).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny)
        found[name] = float(error)
        weight.copy_(approximation)
    return found


@torch.no_grad()
def search_laser(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    matrices: Iterable[Matrices] = ("up",),
    layers: Sequence[int] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    edits: int = 1,
    show_progress: bool = True,
) -> list[tuple[LaserEdit, float]]:
    """Find the edits that raise a score, and apply them to `model`: each combination of block, matrices and fraction is
    tried by itself; then the best fraction of each place is added, in the order of their scores, and stays where the
    score rises above what it was, until there are `edits`.

    Args:
        model: as `laser` takes it.
        evaluate: gives a score of the model, higher is better; of validation data (the authors: the first fifth of a
            task's) and without changing the model. It is called `layers x matrices x fractions` times, and once more
            for every edit that is tried on top of others.
        matrices: what is tried in each block; see `laser`.
        layers: blocks to try; None: all.
        fractions: what is tried of each.
        edits: at most so many are applied.
        show_progress: whether a bar shows on stderr.

    Returns:
        The edits that were applied, in order, each with the score after it; none where none helps. However the search
        ends early, the weights are as they were.

    Raises:
        ValueError: as `laser`, or nothing to try.
    """
    places, fractions = list(_places(model, layers, matrices)), list(fractions)
    for fraction in fractions:
        _check_fraction(fraction)
    if not places or not fractions or edits < 1:
        raise ValueError(
            f"search_laser tries {len(places)} places x {len(fractions)} fractions, and applies edits={edits}: give at "
            "least one of each."
        )
    every = {name: module for place in places for name, module in place[1].items()}
    with _restored_on_error(every):
        score, tried = evaluate(model), []
        with tqdm(total=len(places) * len(fractions), desc="LASER", disable=not show_progress) as bar:
            for (layer, kind), weights in places:
                spectra = {
                    name: torch.linalg.svd(_wide(_matrix(m)), full_matrices=False) for name, m in weights.items()
                }
                for fraction in fractions:
                    with _restored(weights):
                        _write(weights, spectra, fraction)
                        tried.append((evaluate(model), LaserEdit(layer, kind, fraction), weights))
                    bar.update()
        applied: list[tuple[LaserEdit, float]] = []
        best: dict[tuple[int | None, str], tuple] = {}
        for one in sorted(tried, key=lambda one: -one[0]):
            best.setdefault((one[1].layer, one[1].matrices), one)
        for found, edit, weights in best.values():
            if len(applied) == edits or (found <= score and not applied):
                break
            kept = {name: _matrix(module).clone() for name, module in weights.items()}
            spectra = _spectra(weights)
            _write(weights, spectra, edit.fraction)
            now = evaluate(model) if applied else found
            if now > score:
                applied.append((edit, now))
                score = now
            else:
                for name, module in weights.items():
                    _matrix(module).copy_(kept[name])
    return applied


def _spectra(weights: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, ...]]:
    return {name: torch.linalg.svd(_wide(_matrix(one)), full_matrices=False) for name, one in weights.items()}


def _write(weights: Mapping[str, nn.Module], spectra: Mapping[str, tuple[Tensor, ...]], fraction: float) -> None:
    for name, module in weights.items():
        U, S, Vh = spectra[name]
        rank = int(fraction * len(S))
        _matrix(module).copy_((U[:, :rank] * S[:rank]) @ Vh[:rank])


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _matrix(module: nn.Module) -> Tensor:
    weight = module.weight.data
    return weight.t() if isinstance(module, Conv1D) else weight


@contextmanager
def _restored(weights: Mapping[str, nn.Module]) -> Iterator[None]:
    kept = {name: module.weight.data.clone() for name, module in weights.items()}
    try:
        yield
    finally:
        for name, module in weights.items():
            module.weight.data.copy_(kept[name])


@contextmanager
def _restored_on_error(weights: Mapping[str, nn.Module]) -> Iterator[None]:
    kept = {name: module.weight.data.clone() for name, module in weights.items()}
    try:
        yield
    except BaseException:
        for name, module in weights.items():
            module.weight.data.copy_(kept[name])
        raise


def _places(
    model: nn.Module, layers: Sequence[int] | None, matrices: Iterable[str]
) -> Iterator[tuple[tuple[int, str], dict[str, nn.Module]]]:
    matrices = [matrices] if isinstance(matrices, str) else list(matrices)
    for layer in range(len(structures_of(model))) if layers is None else layers:
        for kind in matrices:
            yield (layer, kind), _weights(model, layer, kind)


def _weights(model: nn.Module, layer: int | None, matrices: str) -> dict[str, nn.Module]:
    """The layers that are meant, checked."""
    if matrices not in get_args(Matrices):
        raise ValueError(f"matrices={matrices!r} is unknown; choose one of {list(get_args(Matrices))}.")
    blocks = structures_of(model)
    if layer is not None and not -len(blocks) <= layer < len(blocks):
        raise ValueError(f"layer={layer} is none of the {len(blocks)} blocks; give 0 to {len(blocks) - 1}, or None.")
    chosen = blocks if layer is None else [blocks[layer]]
    roles = _GROUPS.get(matrices, (matrices,))
    names = dict.fromkeys(name for block in chosen for role in roles if (name := getattr(block, role)))
    if not names:
        raise ValueError(f"matrices={matrices!r}: the blocks of {type(model).__name__} have none.")
    modules, quantisation = dict(model.named_modules()), get_quantization_kwargs(model)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        module = modules[name]
        if isinstance(module, AdapterLayer) or hasattr(module, "base_layer"):
            raise ValueError(f"'{name}' has an adapter: merge it first (merge_and_unload), or unload it.")
        if backend_of(module, **quantisation) is not None:
            raise ValueError(
                f"'{name}' is quantised, and rounding would undo the rank. Load the base dense, or keep the factors: "
                'FactoredConfig(form=LowRank(trained=""), rank=SideFraction(...)).'
            )
        if len(owners[id(module.weight)]) > 1:
            raise ValueError(f"'{name}' shares its weight with {owners[id(module.weight)]}; LASER would change both.")
    return {name: modules[name] for name in names}


def _check_fraction(fraction: float) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction!r} is out of range: it takes a number in [0, 1].")
