"""Which entries of each adapter's update take part in a merge: trimmed, dropped at random, or cut as a band."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..sparsity.selection import Cut, Source, find_cut, selected, stream_seed
from ..utils.option_types import Decay, Fraction, PositiveFraction
from ..utils.parts import Part, register_part, require
from .deltas import Deltas, Scan


@dataclass(frozen=True)
class Kept:
    """What a `Sparsify` leaves of one weight's updates."""

    mask: Tensor
    """bool `[n, u]`."""
    probability: Tensor | None = None
    """`[n, u]`, with what probability each entry was to stay; None: there was no draw."""


@dataclass(frozen=True)
class Sparsify(Part):
    """Base of what thins updates before they are merged; the options are fields, `__call__` decides of one weight."""

    part_kind: ClassVar[str] = "sparsify"
    draws: ClassVar[bool] = False
    """Whether entries stay with a probability that `Kept.probability` tells."""

    def prepare(self, scan: Scan, seed: int) -> Any:
        """What must be known of all weights before the first is decided, from passes over them; None by default."""

    def __call__(self, deltas: Deltas, plan: Any, seed: int) -> Kept:
        """Decide of one weight; `plan` is what `prepare` gave. Entries that are not held are not kept either.

        Draws are seeded by `stream_seed(seed, module, adapter)`: the same in every pass, whatever other adapters hold.
        """
        raise NotImplementedError


@register_part("keep_all")
@dataclass(frozen=True)
class KeepAll(Sparsify):
    """Every entry takes part."""

    def __call__(self, deltas: Deltas, plan: Any, seed: int) -> Kept:
        """All that is held."""
        return Kept(deltas.held)


@register_part("top_fraction")
@dataclass(frozen=True)
class TopFraction(Sparsify):
    r"""The :math:`\lfloor K d \rfloor` entries of largest magnitude of each adapter, at least one, where d counts the
    entries that it holds (the trimming of TIES; Yadav et al., 2023). Equal magnitudes at the end are drawn for."""

    density: PositiveFraction = 0.2
    """K: fraction of entries that stay; 1 trims nothing."""
    scope: Literal["global", "tensor"] = "global"
    """Whether the entries of all weights of an adapter are ranked together, or those of each weight."""
    count: Literal["exact", "code"] = "exact"
    r"""`code` is the authors': entries up to the :math:`(\lfloor K d \rfloor + 1)`-th largest magnitude, and all that
    equal it."""

    def prepare(self, scan: Scan, seed: int) -> list[Cut] | None:
        """With `scope="global"` where the ranking of each adapter ends, by three to five passes over its values."""
        if self.scope == "tensor" or self.density == 1:
            return None
        cuts = []
        for adapter in range(scan.adapters):
            sources = [self._source(name, adapter, scan, seed) for name in scan.names]
            total = sum(chunk.numel() for source in sources for chunk in source.chunks())
            cuts.append(self._cut(sources, total))
        return cuts

    def __call__(self, deltas: Deltas, plan: list[Cut] | None, seed: int) -> Kept:
        """The entries before the cut."""
        if self.density == 1:
            return Kept(deltas.held)
        mask = torch.zeros_like(deltas.held)
        for adapter in range(len(mask)):
            places = deltas.held[adapter].nonzero().squeeze(1)
            one = Scan([deltas.name], len(mask), lambda name: deltas)
            source = self._source(deltas.name, adapter, one, seed)
            cut = self._cut([source], places.numel()) if plan is None else plan[adapter]
            mask[adapter, places[selected(source, cut).long()]] = True
        return Kept(mask)

    def _source(self, name: str, adapter: int, scan: Scan, seed: int) -> Source:
        return Source(name, lambda: iter((scan.own(name, adapter).abs(),)), stream_seed(seed, name, adapter))

    def _cut(self, sources: list[Source], total: int) -> Cut:
        wanted = int(total * self.density)
        if self.count == "code":
            return find_cut(sources, min(wanted + 1, total), draw=False)
        return find_cut(sources, min(max(wanted, 1), total))


@register_part("drop_random")
@dataclass(frozen=True)
class DropRandom(Sparsify):
    """Each entry is dropped with probability p, by itself (DARE; Yu et al., 2024): what stays is binomial in number."""

    rate: Decay = 0.9
    """p: probability that an entry is dropped (DARE: 0.9 to 0.99)."""

    draws: ClassVar[bool] = True

    def __call__(self, deltas: Deltas, plan: Any, seed: int) -> Kept:
        """One draw for each entry that is held."""
        mask = deltas.held.clone()
        for adapter, held in enumerate(deltas.held):
            mask[adapter, held] = _uniform(int(held.sum()), seed, deltas.name, adapter) >= self.rate
        return Kept(mask, torch.full_like(deltas.values, 1 - self.rate))


@register_part("drop_by_rank")
@dataclass(frozen=True)
class DropByRank(Sparsify):
    r"""Each entry stays with a probability that rises with the rank of its magnitude, :math:`k = (d - \epsilon) +
    2\epsilon\,\frac{rank - 1}{n - 1}`, rank 1 the smallest of n (MagPrune of DELLA; Deep et al., 2024). The mean is d;
    an entry that is ranked alone stays with probability d. Equal magnitudes are ranked by a draw."""

    density: PositiveFraction = 0.7
    """d: the mean probability of staying."""
    epsilon: Decay = 0.07
    """Half of the window of probabilities; the authors' `window_size` is twice this."""
    by: Literal["row", "layer", "magnitude"] = "row"
    """Ranks within each row of the weight, or within all of it; `magnitude` takes how far the magnitude lies between
    the weight's smallest and largest in place of the rank."""

    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        below = self.epsilon < self.density and self.epsilon <= 1 - self.density
        require(below, self, "epsilon", "less than density, and at most 1 - density: probabilities lie in (0, 1]")

    def __call__(self, deltas: Deltas, plan: Any, seed: int) -> Kept:
        """One draw for each entry that is held."""
        mask, probability = deltas.held.clone(), torch.full_like(deltas.values, self.density)
        for adapter, held in enumerate(deltas.held):
            share = self._share(deltas, adapter, held, seed)
            keep = (self.density - self.epsilon) + 2 * self.epsilon * share
            probability[adapter, held] = keep
            mask[adapter, held] = _uniform(keep.numel(), seed, deltas.name, adapter) >= 1 - keep
        return Kept(mask, probability)

    def _share(self, deltas: Deltas, adapter: int, held: Tensor, seed: int) -> Tensor:
        """0 for the smallest, 1 for the largest, 0.5 for one that is alone."""
        size = deltas.values[adapter][held].abs()
        if self.by == "magnitude":
            span = (size.max() - size.min()) if size.numel() else 0.0
            return (size - size.min()) / span if span > 0 else torch.full_like(size, 0.5)
        groups = deltas.rows[held] if self.by == "row" else torch.zeros_like(size, dtype=torch.int64)
        rank, count = _ranks(size, groups, stream_seed(seed, "ties", deltas.name, adapter))
        return torch.where(count > 1, rank / (count - 1).clamp_min(1), 0.5).to(size.dtype)


@register_part("band")
@dataclass(frozen=True)
class Band(Sparsify):
    r"""In each row the :math:`\lfloor\gamma n\rfloor` largest magnitudes go, and of what is left the
    :math:`\lfloor\beta n\rfloor` largest stay, where n counts the entries that the adapter holds in the row (Model
    Breadcrumbs; Davari and Belilovsky, 2024)."""

    keep: Fraction = 0.15
    r""":math:`\beta` (the authors search 0.05 to 0.20)."""
    outliers: Decay = 0.006
    r""":math:`\gamma` (the authors search 0.001 to 0.01)."""
    by: Literal["row", "layer"] = "row"
    """Rows, as the authors' code, or the whole weight."""
    outliers_first: bool = True
    r"""False keeps the largest :math:`\lfloor\beta n\rfloor` first and drops the outliers from these."""

    def __call__(self, deltas: Deltas, plan: Any, seed: int) -> Kept:
        """The entries of the band."""
        mask = torch.zeros_like(deltas.held)
        for adapter, held in enumerate(deltas.held):
            size = deltas.values[adapter][held].abs()
            groups = deltas.rows[held] if self.by == "row" else torch.zeros_like(size, dtype=torch.int64)
            rank, count = _ranks(size, groups, stream_seed(seed, "ties", deltas.name, adapter))
            from_top = count - 1 - rank
            # Not a float product cast to int: 0.29 * 100 is 28.999999999999996.
            dropped, kept = ((count * share + 1e-9).floor() for share in (self.outliers, self.keep))
            end = dropped + kept if self.outliers_first else kept
            mask[adapter, held] = (from_top >= dropped) & (from_top < end)
        return Kept(mask)


def _uniform(count: int, seed: int, name: str, adapter: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed(seed, name, adapter))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _ranks(size: Tensor, groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rank of each size in its group, 0 the smallest, and how many the group has; equal ones in a drawn order."""
    order = torch.randperm(size.numel(), generator=torch.Generator().manual_seed(seed))
    order = order[size[order].argsort(stable=True)]
    order = order[groups[order].argsort(stable=True)]
    _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(groups)
    rank[order] = torch.arange(groups.numel())
    return rank - first[inverse], counts[inverse]
