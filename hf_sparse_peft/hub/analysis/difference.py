r"""What differs between two adapters of one base: options, supports, updates. Reads files only, no base model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...tuners import AdapterLayer
from ...tuners.shared.file_check import CONFIG_FILE, WEIGHTS_FILE, AdapterFile, read_adapter
from ...tuners.shared.pieces import EVERYWHERE, LowRank, Nonlinear, Piece, summed_entries
from ...utils.tables import Table, table
from ..held_layers import layers_without_base
from .mask_overlap import MaskOverlap, TensorOverlap
from .module_picture import draw_modules


@dataclass(frozen=True)
class ModuleDifference:
    """Two updates of one weight `[out, in]`."""

    first: float | None
    r""":math:`\|\Delta W_1\|_F`; None where the update is known with the base's weights only (DoRA)."""
    second: float | None
    r""":math:`\|\Delta W_2\|_F`, likewise."""
    difference: float | None
    r""":math:`\|\Delta W_1 - \Delta W_2\|_F`; None where one of the two is."""
    cosine: float | None
    r""":math:`\langle\Delta W_1, \Delta W_2\rangle_F / (\|\Delta W_1\|_F \|\Delta W_2\|_F)`; None where one is 0 or
    unknown."""
    ranks: tuple[int, int]
    """Living components of the low-rank halves."""
    overlap: TensorOverlap | None
    """Entries in the supports; None where one has none."""
    opposite: float | None = None
    """Fraction of the entries in both supports whose values have opposite signs, on which merges by a vote (TIES)
    decide; None where they share none."""


@dataclass(frozen=True)
class AdapterDifference:
    """What differs between two adapters."""

    config: dict[str, tuple[Any, Any]]
    """Option -> its value in the first and in the second, of options that differ; what only one has is None there."""
    only_first: tuple[str, ...]
    """Modules and other tensors that only the first has."""
    only_second: tuple[str, ...]
    """Likewise."""
    modules: dict[str, ModuleDifference] = field(repr=False)
    """By module name, of modules that both adapt."""
    others: dict[str, float] = field(repr=False)
    """Norm of the difference of heads and biases that both have, by their keys."""

    @property
    def equal(self) -> bool:
        """Whether the two change the base alike; options may differ all the same."""
        same = all(m.difference == 0 for m in self.modules.values())
        return same and not (self.only_first or self.only_second or any(self.others.values()))

    @property
    def overlap(self) -> MaskOverlap | None:
        """Of the supports of all modules where both have one; None without any."""
        found = {name: m.overlap for name, m in self.modules.items() if m.overlap and m.overlap.first}
        return MaskOverlap(found) if found and any(one.second for one in found.values()) else None

    def table(self) -> Table:
        """A line for each module and one for all; `str()` of it is aligned text."""
        rows = [(name, *_cells(module)) for name, module in self.modules.items()]
        squares = [(m.first, m.second, m.difference) for m in self.modules.values() if m.difference is not None]
        norms = [sum(one[at] ** 2 for one in squares) ** 0.5 for at in range(3)] if squares else [None] * 3
        overlap = self.overlap
        totals = (
            f"{len(rows)} modules", *norms, None, "", None if overlap is None else f"{overlap.repeated:.1%}",
            None if overlap is None else f"{overlap.chance:.1%}", _mean_opposite(self.modules.values()),
        )  # fmt: skip
        columns = (
            "module", "norm A", "norm B", "norm A-B", "cosine", "ranks", "A's entries in B", "by chance", "opposite",
        )  # fmt: skip
        return table(columns, rows, totals=totals)

    def options_table(self) -> Table:
        """A line for each option that differs."""
        return table(("option", "A", "B"), [(name, *map(_shown, pair)) for name, pair in self.config.items()])

    def draw(self, path: str | Path) -> Path:
        """A heat map of the norm of the difference relative to the larger of the two updates, blocks over kinds of
        matrices; returns `path`."""
        values = {
            name: round(100 * m.difference / (max(m.first, m.second) or 1.0), 1)
            for name, m in self.modules.items()
            if m.difference is not None
        }
        return draw_modules(values, path, "difference of two adapters", "norm [% of the larger update's]")


@torch.no_grad()
def adapter_difference(first: str | os.PathLike, second: str | os.PathLike) -> AdapterDifference:
    r"""Compare two adapter folders of this package, of the same tuner or not, by what they do to the base.

    For every module that both adapt: Frobenius norms of :math:`\Delta W_1`, :math:`\Delta W_2` and
    :math:`\Delta W_1 - \Delta W_2` in fp32, their cosine, and how many entries the supports share (with what chance
    would give: `MaskOverlap`). A dense fp32 matrix of each update is held, one module at a time.

    Args:
        first: adapter folder.
        second: another.

    Raises:
        ValueError: a folder holds no whole adapter of this package, or a module has another shape in the other; names
            file and tensor.
    """
    one, two = (read_adapter(Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE) for folder in (first, second))
    names = [name for name in sorted(one.modules) if name in two.modules]
    for name in names:
        if one.sizes[name][:2] != two.sizes[name][:2]:
            shapes = " and ".join("x".join(map(str, file.sizes[name][:2])) for file in (one, two))
            raise ValueError(f"'{name}' is {shapes}: '{first}' and '{second}' are adapters of different base models.")
    layers = [layers_without_base(file) for file in (one, two)]
    held = [_heads(file, next(iter(found.values()))) for file, found in zip((one, two), layers, strict=True)]
    shared = [key for key in held[0] if key in held[1] and held[0][key].shape == held[1][key].shape]
    return AdapterDifference(
        config=_options(one.config.to_dict(), two.config.to_dict()),
        only_first=_only(one.modules, two.modules) + _only(held[0], shared),
        only_second=_only(two.modules, one.modules) + _only(held[1], shared),
        modules={name: _compare(layers[0][name], layers[1][name]) for name in names},
        others={key: float((held[0][key].float() - held[1][key].float()).norm()) for key in shared},
    )


def _heads(file: AdapterFile, layer: AdapterLayer) -> dict[str, Tensor]:
    """Heads and biases, without the state of running schedules."""
    return {key: t for key, t in file.others.items() if not layer.is_training_state(key.rpartition(".")[2])}


def _only(names: Mapping[str, Any], other: Any) -> tuple[str, ...]:
    return tuple(name for name in names if name not in other)


_PLACES = frozenset({"sizes", "auto_mapping", "peft_version"})
"""Options that say what the file holds, or who wrote it; the modules tell."""


def _options(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [name for name in {**first, **second} if name not in _PLACES]
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _compare(one: AdapterLayer, two: AdapterLayer) -> ModuleDifference:
    pieces = [layer.pieces("default") for layer in (one, two)]
    dense = [_dense(found, (one.out_features, one.in_features)) for found in pieces]
    norms = [None if update is None else float(update.norm()) for update in dense]
    known = None not in norms
    return ModuleDifference(
        first=norms[0],
        second=norms[1],
        difference=float((dense[0] - dense[1]).norm()) if known else None,
        cosine=float((dense[0] * dense[1]).sum()) / (norms[0] * norms[1]) if known and all(norms) else None,
        ranks=tuple(sum(p.exact_rank for p in found if isinstance(p, LowRank)) for found in pieces),
        overlap=_overlap(*pieces, one.out_features * one.in_features),
        opposite=_opposite(*pieces),
    )


def _dense(pieces: list[Piece], shape: tuple[int, int]) -> Tensor | None:
    if any(isinstance(piece, (*EVERYWHERE[1:], Nonlinear)) for piece in pieces):
        return None
    update = torch.zeros(shape)
    for piece in pieces:
        piece.add_(update)
    return update


def _overlap(one: list[Piece], two: list[Piece], numel: int) -> TensorOverlap | None:
    first, second = (_entries(pieces) for pieces in (one, two))
    if first is None or second is None:
        return None
    both = int(torch.isin(first[0], second[0]).sum())
    return TensorOverlap(numel, first[0].numel(), second[0].numel(), both)


def _opposite(one: list[Piece], two: list[Piece]) -> float | None:
    first, second = (_entries(pieces) for pieces in (one, two))
    if first is None or second is None:
        return None
    signs = [
        values[torch.isin(positions, other[0])].sign()
        for (positions, values), other in ((first, second), (second, first))
    ]
    return float((signs[0] * signs[1] < 0).float().mean()) if signs[0].numel() else None


def _entries(pieces: list[Piece]) -> tuple[Tensor, Tensor] | None:
    """Sorted positions and values of the supports."""
    return summed_entries([piece for piece in pieces if not isinstance(piece, (*EVERYWHERE, Nonlinear))])


def _mean_opposite(modules: Iterable[ModuleDifference]) -> str | None:
    """Over all entries that are in both supports."""
    shared = [(m.overlap.both, m.opposite) for m in modules if m.overlap and m.opposite is not None]
    count = sum(both for both, _ in shared)
    return f"{sum(both * part for both, part in shared) / count:.1%}" if count else None


def _cells(module: ModuleDifference) -> tuple[Any, ...]:
    overlap, repeated, chance = module.overlap, None, None
    if overlap is not None and overlap.first:
        repeated, chance = f"{overlap.both / overlap.first:.1%}", f"{overlap.second / overlap.numel:.1%}"
    ranks = " / ".join(map(str, module.ranks))
    opposite = None if module.opposite is None else f"{module.opposite:.1%}"
    return module.first, module.second, module.difference, module.cosine, ranks, repeated, chance, opposite


def _shown(value: Any) -> str:
    text = str(sorted(value) if isinstance(value, (set, frozenset)) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
