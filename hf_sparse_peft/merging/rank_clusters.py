"""LoRA-LEGO: components of low-rank adapters as units that are clustered, each cluster one component of the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sparsity.selection import stream_seed
from ..tuners.shared.pieces import LowRank, Piece
from ..utils.option_types import NonNegativeInt, PositiveInt
from ..utils.parts import register_part
from .row import MergeMethod


@dataclass(frozen=True)
class Clusters:
    """Units `[m, d]` in k clusters."""

    centroids: Tensor
    """`[k, d]`, the mean of each cluster's units, of their aligned signs."""
    labels: Tensor
    """int64 `[m]`, the cluster of each unit."""
    signs: Tensor
    """`[m]`, 1 or -1: what a unit is multiplied by in its cluster."""


@register_part("rank_clusters")
@dataclass(frozen=True)
class RankClusters(MergeMethod):
    r"""A component of a low-rank adapter, row :math:`a_i` of A and column :math:`b_i` of B, is a unit
    :math:`[a_i; b_i]`, with the root of its scale on each half. The units of all adapters of a module are clustered by
    k-means, and each centroid, scaled to the mean norm of its units, is a component of the merged adapter of rank k
    (LoRA-LEGO; Zhao et al., 2025). No official code is known: the two reweightings follow descriptions of the paper.

    With as many clusters as there are units the result is the weighted sum, exactly; with k the rank of each adapter it
    is like a mean. Weights multiply the scale of units.
    """

    clusters: PositiveInt | None = None
    """k; None: the largest rank of an adapter in the module. Never more than there are units."""
    balanced: bool = True
    r"""Whether each unit is written with :math:`\|a_i\| = \|b_i\|` first: :math:`(c\,a, b/c)` is the same component for
    any c, and plain k-means takes these for different ones. The paper does not say."""
    align_signs: bool = True
    """Whether a unit may enter a cluster as its negative, :math:`(-a, -b)`, the same component. The paper does not
    say."""
    output: Literal["none", "sqrt"] = "none"
    r"""`sqrt` multiplies the update by :math:`\sqrt{r/k}`, r the mean rank of the adapters, against the variance of
    more components."""
    seed: NonNegativeInt = 0
    """Of the first centroids."""
    starts: PositiveInt = 10
    """How often k-means starts anew; the closest clusters are taken."""

    def results(
        self, pieces: Mapping[str, list[list[Piece]]], shapes: Mapping[str, tuple[int, int]], weights: Sequence[float]
    ) -> Iterator[tuple[str, list[Piece]]]:
        """One `LowRank` a module.

        Raises:
            ValueError: a module has pieces that are no factors.
        """
        for name, adapters in pieces.items():
            odd = next((piece for found in adapters for piece in found if not isinstance(piece, LowRank)), None)
            if odd is not None:
                raise ValueError(
                    f"'{name}' has {type(odd).__name__.lower()} beside or in place of factors, and this method "
                    "clusters components of factors. Take a method that works on entries (ties, sum)."
                )
            found = [(piece, weight) for own, weight in zip(adapters, weights, strict=True) for piece in own]
            yield name, [self._merged(name, found, shapes[name])] if found else []

    def _merged(self, name: str, found: Sequence[tuple[LowRank, float]], shape: tuple[int, int]) -> LowRank:
        units = torch.cat([self._units(piece, weight) for piece, weight in found])
        ranks = [piece.exact_rank for piece, _ in found]
        k = min(self.clusters or max(ranks), len(units))
        if not k:
            return LowRank(units.new_zeros(shape[0], 0).float(), units.new_zeros(0, shape[1]).float())
        clusters = cluster_units(units, k, self.align_signs, self.starts, stream_seed(self.seed, name))
        sizes = torch.bincount(clusters.labels, minlength=k)
        norms = units.new_zeros(k).index_add_(0, clusters.labels, units.norm(dim=1)) / sizes
        own = clusters.centroids.norm(dim=1)
        merged = clusters.centroids * torch.where(own > 0, norms / own, 1.0)[:, None]
        if self.output == "sqrt":
            merged = merged * (sum(ranks) / len(ranks) / k) ** 0.25
        A, B = merged[:, : shape[1]], merged[:, shape[1] :].t()
        return LowRank(B.float().contiguous(), A.float().contiguous())

    def _units(self, piece: LowRank, weight: float) -> Tensor:
        """`[r, in + out]`, fp64, living components."""
        scale = torch.full((piece.A.shape[0],), weight * piece.scale, dtype=torch.float64)
        if piece.gate is not None:
            scale = scale * piece.gate.detach().double()
        A, B = piece.A.detach().double() * scale.abs().sqrt()[:, None], piece.B.detach().double()
        B = (B * scale.abs().sqrt() * scale.sign()).t()
        if self.balanced:
            a, b = A.norm(dim=1), B.norm(dim=1)
            ratio = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)[:, None]
            A, B = A * ratio, B / ratio
        return torch.cat([A, B], dim=1)[scale != 0]


def cluster_units(units: Tensor, k: int, align_signs: bool, starts: int, seed: int, steps: int = 100) -> Clusters:
    """k-means of units `[m, d]` from `starts` drawn beginnings (k-means++), at most `steps` updates each. No cluster is
    empty: where units are equal, clusters share them out."""
    generator = torch.Generator().manual_seed(seed)
    if k == len(units):
        return Clusters(units, torch.arange(k), units.new_ones(k))
    tries = (_one_start(units, k, align_signs, steps, generator) for _ in range(starts))
    return min(tries, key=lambda found: _spread(units, found))


def _one_start(units: Tensor, k: int, align_signs: bool, steps: int, generator: torch.Generator) -> Clusters:
    first = int(torch.randint(len(units), (), generator=generator))
    centroids = units[first : first + 1]
    for _ in range(k - 1):
        distance = _distances(units, centroids, align_signs)[0].min(1).values.clamp_min(0)
        total = distance.sum()
        chances = distance / total if total > 0 else torch.full_like(distance, 1 / len(units))
        drawn = int(torch.multinomial(chances, 1, generator=generator))
        centroids = torch.cat([centroids, units[drawn : drawn + 1]])
    labels = None
    for _ in range(steps):
        distance, signs = _distances(units, centroids, align_signs)
        new = _without_empty(distance, distance.min(1).indices)
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        chosen = signs.gather(1, labels[:, None]).squeeze(1)
        sums = torch.zeros_like(centroids).index_add_(0, labels, units * chosen[:, None])
        centroids = sums / torch.bincount(labels, minlength=k)[:, None]
    return Clusters(centroids, labels, chosen)


def _distances(units: Tensor, centroids: Tensor, align_signs: bool) -> tuple[Tensor, Tensor]:
    """Squared distances `[m, k]` to the centroid or, if that is nearer, to its negative; and the signs."""
    product = units @ centroids.t()
    signs = torch.where(product < 0, -1.0, 1.0).to(units) if align_signs else torch.ones_like(product)
    return units.square().sum(1)[:, None] + centroids.square().sum(1) - 2 * product * signs, signs


def _without_empty(distance: Tensor, labels: Tensor) -> Tensor:
    """Each empty cluster takes the unit that is farthest from its centroid, of clusters with several."""
    labels, k = labels.clone(), distance.shape[1]
    for empty in (torch.bincount(labels, minlength=k) == 0).nonzero().flatten().tolist():
        counts = torch.bincount(labels, minlength=k)
        own = distance.gather(1, labels[:, None]).squeeze(1).masked_fill(counts[labels] < 2, -torch.inf)
        labels[int(own.argmax())] = empty
    return labels


def _spread(units: Tensor, found: Clusters) -> float:
    return float((units * found.signs[:, None] - found.centroids[found.labels]).square().sum())
