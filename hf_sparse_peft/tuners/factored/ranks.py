"""Rank rules: how many components each weight keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ...utils.option_types import Decay, Fraction, PositiveFraction, PositiveInt, Range
from ...utils.parts import Part, register_part, require
from .form import Form

Weights = Mapping[str, Callable[[], Tensor]]
"""By module name, what gives its dense weight `[rows, cols]`, fp32 or fp64."""
Shapes = Mapping[str, tuple[int, int]]
"""By module name, rows and columns of its weight."""


@dataclass(frozen=True)
class RankChoice(Part):
    """How many components the form of each weight has."""

    part_kind: ClassVar[str] = "rank_rule"
    reads_weights: ClassVar[bool] = False
    """Whether it needs the weights; on the meta device there are none, and the largest rank that saves is taken."""

    def ranks(self, form: Form, shapes: Shapes, weights: Weights) -> dict[str, int]:
        """The rank of each module, at least 1; modules that are left out stay dense."""
        raise NotImplementedError


def largest_rank(form: Form, rows: int, cols: int, numbers: float) -> int:
    """The largest rank at which the form stores at most that many numbers; 0 where none does."""
    low, high = 0, min(rows, cols)
    numbers *= 1 + 1e-9  # a third of 7 x 42 is 97.99999999999999 in floats, and a rank of 2 takes 98
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if form.stored_numbers(rows, cols, middle) <= numbers else (low, middle - 1)
    return low


@register_part("fixed_rank")
@dataclass(frozen=True)
class FixedRank(RankChoice):
    """The same rank everywhere, at most a weight's smaller side."""

    r: PositiveInt = 64
    """The rank."""

    def ranks(self, form: Form, shapes: Shapes, weights: Weights) -> dict[str, int]:
        """r for each."""
        return {name: min(self.r, *shape) for name, shape in shapes.items()}


@register_part("side_fraction")
@dataclass(frozen=True)
class SideFraction(RankChoice):
    r"""A fraction of each weight's smaller side, :math:`\lfloor \rho \min(m, n) \rfloor`, at least 1 (LASER's
    :math:`\rho`)."""

    fraction: PositiveFraction = 0.25
    r""":math:`\rho`."""

    def ranks(self, form: Form, shapes: Shapes, weights: Weights) -> dict[str, int]:
        """Weight after weight."""
        return {name: max(1, int(self.fraction * min(shape))) for name, shape in shapes.items()}


@register_part("parameter_ratio")
@dataclass(frozen=True)
class ParameterRatio(RankChoice):
    r"""The largest rank with at most a fraction of each weight's numbers: for low rank
    :math:`\lfloor \rho\, m n / (m + n) \rfloor`. A weight that has none stays dense."""

    ratio: PositiveFraction = 0.5
    r""":math:`\rho`: numbers that are stored, by those of the weight."""

    def ranks(self, form: Form, shapes: Shapes, weights: Weights) -> dict[str, int]:
        """Weight after weight."""
        found = {name: largest_rank(form, *shape, self.ratio * shape[0] * shape[1]) for name, shape in shapes.items()}
        return {name: rank for name, rank in found.items() if rank}


@register_part("largest_rank_fraction")
@dataclass(frozen=True)
class LargestRankFraction(RankChoice):
    r"""A fraction of the largest rank that stores no more than the weight, for low rank
    :math:`\lfloor \rho \lfloor mn/(m+n) \rfloor \rfloor`, at least 1; where it is that rank itself the weight stays
    dense (Greenformers; Cahyawijaya, 2021)."""

    fraction: PositiveFraction = 0.5
    r""":math:`\rho`."""

    def ranks(self, form: Form, shapes: Shapes, weights: Weights) -> dict[str, int]:
        """Weight after weight."""
        found = {}
        for name, (rows, cols) in shapes.items():
            largest = largest_rank(form, rows, cols, rows * cols)
            rank = max(1, int(self.fraction * largest))
            if rank < largest:
                found[name] = rank
        return found


@register_part("energy_fraction")
@dataclass(frozen=True)
class EnergyFraction(RankChoice):
    r"""The fewest components with a fraction of each weight's energy,
    :math:`\sum_{i \le k} \sigma_i^2 \ge \rho \sum_i \sigma_i^2`."""

    fraction: PositiveFraction = 0.9
    r""":math:`\rho`."""
    of: Literal["squares", "values"] = "squares"
    """What adds up to the energy: the squares of singular values, or the values."""

    reads_weights: ClassVar[bool] = True

    def ranks(self, form: Form, shapes: Shapes, weights: Weights) -> dict[str, int]:
        """Weight after weight."""
        power = 2 if self.of == "squares" else 1
        return {
            name: energy_rank(torch.linalg.svdvals(weight()), self.fraction, power) for name, weight in weights.items()
        }


def energy_rank(values: Tensor, fraction: float, power: int = 2) -> int:
    """The fewest of the descending singular values `values` with that fraction of the sum of their powers."""
    energies = values.double().pow(power).cumsum(0)
    return min(1 + int((energies < fraction * energies[-1]).sum()), len(values))


@register_part("singular_value_threshold")
@dataclass(frozen=True)
class SingularValueThreshold(RankChoice):
    r"""One threshold :math:`\tau` for the normalised singular values of all weights,
    :math:`\tilde\sigma_i = (\sigma_i - \sigma_{\min}) / (\sigma_{\max} - \sigma_{\min})`: a weight keeps those with
    :math:`\tilde\sigma_i \ge \tau` (WeLore; Jaiswal et al., 2024).

    :math:`\tau` is found by bisection so that the effective rank reduction
    :math:`1 - \sum k / \sum \min(m, n)` over all targets is `reduction`. Weights that lose at most `min_ratio` of their
    smaller side are no low-rank components and stay dense. The smallest singular value never counts in.
    """

    reduction: Decay = 0.5
    """Effective rank reduction over all targets."""
    threshold: Annotated[float, Range(least=0, most=1)] | None = None
    r""":math:`\tau` itself; None: as `reduction` wants it."""
    min_ratio: Fraction = 0.5
    """A weight is factored where more than that of its smaller side is cut (the official fine-tuning scripts: 0.4999,
    the compression script: 0)."""

    reads_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.min_ratio < 1, self, "min_ratio", "less than 1: no weight loses more than its side")

    def ranks(self, form: Form, shapes: Shapes, weights: Weights) -> dict[str, int]:
        """The low-rank components."""
        spectra = {name: torch.linalg.svdvals(weight()).double() for name, weight in weights.items()}
        kept = self.kept(spectra)
        sides = {name: len(values) for name, values in spectra.items()}
        return {name: max(k, 1) for name, k in kept.items() if (sides[name] - k) / sides[name] > self.min_ratio}

    def kept(self, spectra: Mapping[str, Tensor]) -> dict[str, int]:
        """How many of each weight's singular values, descending, are kept."""
        normalised = {name: _normalised(values) for name, values in spectra.items()}
        threshold = self.threshold
        if threshold is None:
            total = sum(len(values) for values in normalised.values())
            threshold = _bisected(list(normalised.values()), total - round(self.reduction * total))
        return {name: int((values >= threshold).sum()) for name, values in normalised.items()}


def _normalised(values: Tensor) -> Tensor:
    spread = values[0] - values[-1]
    return (values - values[-1]) / spread if spread > 0 else torch.ones_like(values)


def _bisected(normalised: list[Tensor], wanted: int) -> float:
    """A threshold in [0, 1] that keeps the smallest number of values that is at least `wanted`."""
    low, high = 0.0, 1.0
    together = torch.cat(normalised)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if int((together >= middle).sum()) >= wanted else (low, middle)
    return low
