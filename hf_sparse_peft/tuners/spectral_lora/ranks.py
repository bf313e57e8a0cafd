"""How many components bases take of each weight, where that follows from the weights when the adapter is injected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from ...sparsity.decomposition import truncated_svd
from ...utils.module_names import block_of
from ...utils.option_types import PositiveFraction, Range
from ...utils.parts import register_part, require
from .bases import RankChoice, Site, Weights


@register_part("energy")
@dataclass(frozen=True)
class Energy(RankChoice):
    """The fewest components of each weight that hold a fraction of its energy, at most r. It takes all singular values
    of all weights."""

    fraction: PositiveFraction = 0.99
    """That fraction."""
    of: Literal["values", "squares"] = "squares"
    """What adds up to the energy: singular values or their squares."""

    def ranks(self, weights: Weights, sites: Mapping[str, Site]) -> dict[str, int]:
        """Weight after weight."""
        return {name: min(self.rank_of(weight()), sites[name].r) for name, weight in weights.items()}

    def rank_of(self, weight: Tensor) -> int:
        """The fewest components of `weight` that have that energy."""
        energies = torch.linalg.svdvals(weight).double().pow(2 if self.of == "squares" else 1).cumsum(0)
        return 1 + int((energies < self.fraction * energies[-1]).sum())


@register_part("spectrum_spread")
@dataclass(frozen=True)
class SpectrumSpread(RankChoice):
    r"""A fixed total spread over a few candidate ranks: in each transformer block the modules whose r components hold
    the least energy, :math:`E(r) = \sum_{i \le r} \sigma_i^2 / \|W\|_F^2`, get the largest rank (after LaMDA++; Azizi
    et al., 2024, whose exact rule was not confirmed).

    The modules of a block in the order of E get the candidates in equal shares, symmetrically, so that the mean of the
    block stays r as long as no candidate is above a weight's smaller side; a module in the middle keeps r.
    """

    multiples: tuple[Annotated[float, Range(above=0, below=2)], ...] = (0.5, 1.0, 1.5)
    """Candidate ranks as multiples of r, ascending and symmetric around 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        paired = zip(self.multiples, reversed(self.multiples), strict=True)
        good = len(self.multiples) > 1 and all(math.isclose(low + high, 2) for low, high in paired)
        good = good and list(self.multiples) == sorted(self.multiples)
        require(good, self, "multiples", "two or more ascending numbers, symmetric around 1, as (0.5, 1, 1.5)")

    def ranks(self, weights: Weights, sites: Mapping[str, Site]) -> dict[str, int]:
        """Block after block; among equal energies the module that comes first in the model counts as the lower."""
        energy = {name: self.energy(weight(), sites[name].r) for name, weight in weights.items()}
        blocks: dict[str, list[str]] = {}
        for name in energy:
            blocks.setdefault(block_of(name), []).append(name)
        found = {}
        for names in blocks.values():
            for place, name in enumerate(sorted(names, key=energy.__getitem__)):
                site = sites[name]
                rank = round(self._multiple(place, len(names)) * site.r)
                found[name] = min(max(1, rank), site.rows, site.cols)
        return {name: found[name] for name in energy}

    @staticmethod
    def energy(weight: Tensor, r: int) -> float:
        """E(r)."""
        values = truncated_svd(weight, r)[1].double()
        total = float(weight.double().square().sum())
        return float(values.square().sum()) / total if total else 1.0

    def _multiple(self, place: int, modules: int) -> float:
        """What the module at that place, from the lowest energy, gets."""
        mirrored = modules - 1 - place
        if place == mirrored:
            return 1.0
        last = len(self.multiples) - 1
        near = math.floor(min(place, mirrored) * last / (modules - 1) + 0.5)
        return self.multiples[last - near if place < mirrored else near]
