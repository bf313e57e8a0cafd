"""One ranking of the units of many layers whose scores never exist all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .selection import (
    Source,
    find_cut,
    rereadable,
    selected,
    stream_seed,
    top_units,
)


class GlobalRanking:
    """The `total` best units of all layers, shown to it a few layers at a time; with `least=1` every layer keeps at
    least its best, with 0 a layer may be left without.

    Ties are drawn for over all layers with `seed` and their names (`selection.tie_priority`). Memory between two calls
    of `add`: `total` units and scores. The result does not depend on how the layers are grouped.
    """

    def __init__(self, total: int, seed: int = 0, least: int = 1) -> None:
        self.total, self.seed, self.least = total, seed, least
        self._best: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, score_fns: dict[str, Callable[[], Iterable[Tensor]]]) -> None:
        """Let more layers compete: per name the score chunks of all of its units, as `top_units` takes them.

        Raises:
            ValueError: NaN scores, a name twice, or more layers than units may live.
        """
        twice = sorted(set(score_fns) & set(self._best))
        if twice:
            raise ValueError(f"'{twice[0]}' is in the ranking already; every layer competes once.")
        if self.least and len(self._best) + len(score_fns) > self.total:
            raise ValueError(
                f"{self.total} units in all leave none for some of the modules; each keeps at least one. Raise density."
            )
        seeds = {name: stream_seed(self.seed, name) for name in (*self._best, *score_fns)}
        sources = [Source(n, rereadable(scores), seeds[n], units) for n, (units, scores) in self._best.items()]
        for n, scores in score_fns.items():
            chunks = _best_first(scores, seeds[n]) if self.least else rereadable(scores)
            sources.append(Source(n, chunks, seeds[n]))
        available = sum(chunk.numel() for source in sources for chunk in source.chunks())
        cut = find_cut(sources, min(self.total, available))
        kept = {}
        for source in sources:
            units = selected(source, cut)
            places = units if source.units is None else torch.searchsorted(source.units, units)
            kept[source.name] = (units, _read(source.chunks, places))
        self._best = kept

    def units(self) -> dict[str, Tensor]:
        """Sorted units of every layer shown so far."""
        return {name: units for name, (units, _) in self._best.items()}


def raised(chunks: Callable[[], Iterable[Tensor]], units: Tensor) -> Callable[[], Iterator[Tensor]]:
    """The same scores, with those of sorted `units` at infinity: these are always among the best."""
    chunks = rereadable(chunks)

    def with_infinity() -> Iterator[Tensor]:
        for chunk, at in _with_places(chunks(), units):
            yield chunk.index_fill(0, at, torch.inf) if at.numel() else chunk

    return with_infinity


def _best_first(chunks: Callable[[], Iterable[Tensor]], seed: int) -> Callable[[], Iterator[Tensor]]:
    return raised(chunks, top_units(chunks, 1, seed=seed))


def _read(chunks: Callable[[], Iterable[Tensor]], units: Tensor) -> Tensor:
    return torch.cat([chunk[at] for chunk, at in _with_places(chunks(), units)])


def _with_places(chunks: Iterable[Tensor], units: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk with the places of the sorted `units` that fall into it."""
    start = 0
    for chunk in chunks:
        bounds = torch.tensor([start, start + chunk.numel()], device=units.device, dtype=units.dtype)
        first, last = torch.searchsorted(units, bounds).tolist()
        yield chunk, units[first:last].long() - start
        start += chunk.numel()
