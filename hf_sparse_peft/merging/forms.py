"""Merged or restored updates in the form that is asked for: an adapter of this package, a LoRA, a dense model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..hub.folders import check_place
from ..tuners.shared.pieces import LowRank, Piece
from ..utils.tables import Table, table
from .dense_model import DenseBase
from .results import as_entries, as_low_rank, file_bytes, write_adapter, write_lora
from .row import Update

Form = Literal["adapter", "lora", "dense"]
FORMS = ("adapter", "lora", "dense")


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapters` wrote."""

    path: Path
    """The folder."""
    form: Form
    """What is in it."""
    ranks: dict[str, int]
    """Rank of the low-rank half of each module that has one."""
    entries: dict[str, int]
    """Entries in the support of each module that has one; of a dense model the entries that changed."""
    errors: dict[str, float]
    """Relative Frobenius error of each module's update: 0 where it is exact up to fp32's rounding."""
    exact: bool
    """Whether every module's is."""
    file_bytes: int
    """Size of the weights."""

    def table(self) -> Table:
        """A line for each module."""
        rows = [
            (name, self.ranks.get(name), self.entries.get(name), f"{error:.2e}" if error else "exact")
            for name, error in self.errors.items()
        ]
        worst = max(self.errors.values(), default=0.0)
        totals = (
            f"{len(rows)} modules",
            None,
            sum(self.entries.values()),
            f"at most {worst:.2e}" if worst else "exact",
        )
        return table(("module", "rank", "entries", "error"), rows, totals=totals)


@dataclass(frozen=True)
class Merged:
    """What is to be written."""

    results: Iterable[tuple[str, list[Piece] | Update]]
    """Module after module: pieces that are exact, at most one `LowRank` of scale 1 and one `Entries`; or an update."""
    shapes: Mapping[str, tuple[int, int]]
    """Module -> `(out, in)`."""
    others: Mapping[str, Tensor]
    """Heads and biases by their keys."""
    about: Mapping[str, Any]
    """Options of the adapter: base, task, heads."""
    notes: str
    """For the card."""
    rank_of: Callable[[str], int]
    """Rank to fit an update of a module with that needs one."""
    like: Path
    """A folder with an adapter whose rows and labels the base is to have."""


def check_form(out: str | os.PathLike, form: str, rank: int | None) -> None:
    """Refuse, before any work, what `write_merged` would.

    Raises:
        ValueError: names the option.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {list(FORMS)}.")
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank} is no rank; give an integer >= 1, or leave it out.")
    check_place(out, {"adapter": "SPARSE_LORA", "lora": "LORA", "dense": None}[form])


@torch.no_grad()
def write_merged(
    merged: Merged, out: str | os.PathLike, form: Form, rank: int | None, what: str, show_progress: bool
) -> MergeReport:
    """Write `merged` into the folder `out`, whole or not at all.

    Raises:
        ValueError: `out` holds something else, nothing is left, or, of a dense model, the base does not fit.
    """
    target = DenseBase(merged.like, merged.about, merged.shapes, merged.others) if form == "dense" else None
    kept: dict[str, list[Piece]] = {}
    errors, ranks, entries = {}, {}, {}
    with tqdm(total=len(merged.shapes), desc=what, unit="layer", disable=not show_progress) as bar:
        for name, result in merged.results:
            if target is not None:
                entries[name], errors[name] = target.add(name, result), 0.0
            else:
                kept[name], errors[name] = _as_pieces(result, merged, name, rank, form)
                for piece in kept[name]:
                    if isinstance(piece, LowRank):
                        ranks[name] = piece.exact_rank
                    else:
                        entries[name] = piece.values.numel()
            bar.update()
    if form == "adapter":
        write_adapter(out, kept, merged.shapes, merged.others, merged.about, merged.notes)
        size = file_bytes(out)
    elif form == "lora":
        ranks, entries = write_lora(out, kept, merged.others, merged.about), {}
        size = file_bytes(out)
    else:
        size = target.save(out)
    return MergeReport(Path(out), form, ranks, entries, errors, not any(errors.values()), size)


def _as_pieces(
    result: list[Piece] | Update, merged: Merged, name: str, rank: int | None, form: Form
) -> tuple[list[Piece], float]:
    """Pieces of the module, and their relative error."""
    if isinstance(result, Update):
        if form == "adapter" and result.positions is not None:
            return as_entries(result), 0.0
        return as_low_rank(result, rank or merged.rank_of(name))
    if form == "adapter" or all(piece.exact_rank is not None for piece in result):
        return result, 0.0
    dense = torch.zeros(merged.shapes[name])
    for piece in result:
        piece.add_(dense)
    update = Update(name, tuple(dense.shape), None, dense.reshape(-1))
    return as_low_rank(update, rank or merged.rank_of(name))
