r"""The learning rate of sparse values relative to that of low-rank factors, so that LoRA's rate works unchanged.

A step of Adam moves every trained number by about the learning rate :math:`\eta`. A LoRA's step then moves an output
:math:`y_i = w_i^\top x` by about :math:`\eta\,s\,r\,|x| / \sqrt 3`, with :math:`s = \alpha / r` (:math:`A` starts
uniform with variance :math:`1/3n`, and all of :math:`B` moves along the gradient), whatever the weight's shape. A step
of a support moves it by :math:`\eta_S\,k\,|x|`, where :math:`k` entries lie in row :math:`i`: over all rows, of which a
share :math:`f` has any, the root mean square is :math:`k \sqrt f`. A support of as many numbers as a LoRA of rank
:math:`r_S` moves outputs as far as that LoRA where

.. math:: \rho_1 = \frac{s\,r_S}{k \sqrt f}, \qquad r_S = \frac{\sum |S|}{\sum (m + n)}

with sums over all :math:`[m, n]` weights that have a support, and :math:`s` divided by what multiplies the values
(`scale_support`). So for entries at one density :math:`\rho_1` does not depend on how many they are, and falls with the
fan-in; for rows it grows with the root of their number. That is the first step. Later :math:`A` has moved further than
where it started, and :math:`BA` is quadratic in the rate: a LoRA's best rate falls with the root of its rank, and that
of values with their number. So the ratio falls with the root of all numbers, of both halves, as a LoRA's rank
:math:`R`:

.. math:: \rho = \frac{\eta_S}{\eta} = c\,\rho_1 \sqrt{\frac{4}{R}}, \qquad R = r + r_S

:math:`c` is measured at :math:`R = 4` (`recipes/benchmarks/learning.py`): it is smaller where a gradient chose the
units, since these have the largest inputs and keep their signs. That of entries is the best beside a low rank; supports
alone want 0.4 to 1.7 of it in the task that it was measured on; docs/learning.md has the fit and its test. Factors
count with all their components and entries, those that a rule or a mask holds at 0 too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from peft import PeftConfig

from ..rules import UnitSpace
from ..sparsity import Activation, DataCriterion, Grid
from ..tuners import GradientSplit

CONSTANTS = {
    "entry": (3.0, 0.5),
    "block": (4.0, 2.0),
    "column": (1.5, 0.8),
    "row": (8.0, 3.0),
    "diagonal": (4.0, 2.0),
    "subnet": (6.0, 3.0),
}
""":math:`c` by granularity: of supports that no gradient has chosen, and of those that one has. Those of diagonals are
blocks', and that of subnets that a gradient has chosen is not measured."""
MEASURED_RANK = 4
""":math:`R` of the runs that :math:`c` was measured in."""
CUSTOMARY_SCALE = 2.0
"""alpha / r of the LoRA whose rate an adapter without a low-rank half is given."""


def values_ratios(
    adapters: Iterable[tuple[PeftConfig, UnitSpace]], weights: Mapping[str, Sequence[tuple[int, int]]]
) -> dict[int, float]:
    r""":math:`\rho` of the values of supports and subnets by their parameter's id, from the sizes that they start with.

    Where sizes are found in data, which comes after the optimizer is made, entries count as if they were spread evenly
    over the rows of all weights that the adapter has, and :math:`R` is `r`: a run has the same rates before and after,
    and when it is resumed.

    Args:
        adapters: Unit spaces with the config of their adapter: "support" and "subnet_row" of all active adapters.
        weights: Adapter -> `(out, in)` of every weight that it has, with a support or without.
    """
    by_adapter: dict[str, list[tuple[PeftConfig, UnitSpace]]] = {}
    for config, space in adapters:
        by_adapter.setdefault(space.adapter, []).append((config, space))
    found: dict[int, float] = {}
    for name, pairs in by_adapter.items():
        config, spaces = pairs[0][0], [space for _, space in pairs]
        if config.sizes_from_data:
            shares, rank = _shares_spread_evenly(spaces, weights[name]), float(config.r)
        else:
            shares, rank = _shares(spaces), _rank_of_both_halves(spaces)
        found |= _ratios_of_adapter(config, spaces, shares, rank or MEASURED_RANK)
    return found


def _ratios_of_adapter(
    config: PeftConfig, spaces: list[UnitSpace], shares: list[tuple[float, float]], rank: float
) -> dict[int, float]:
    r"""The law, from :math:`r_S` and :math:`k \sqrt f` of each weight and :math:`R`."""
    later, by_gradient, found = math.sqrt(MEASURED_RANK / rank), _by_gradient(config), {}
    for space, (support_rank, spread) in zip(spaces, shares, strict=True):
        sizes = space.layer.sizes[space.adapter]
        scale = _scale_of(config) if config.start is not None else sizes.scaling or CUSTOMARY_SCALE
        scale = abs(scale / (sizes.support_scaling or 1.0))
        kind = "subnet" if space.kind == "subnet_row" else space.unit
        ratio = CONSTANTS.get(kind, CONSTANTS["entry"])[by_gradient] * scale * support_rank / spread * later
        found |= {id(parameter): ratio for parameter in space.parameters()}
    return found


def _shares(spaces: list[UnitSpace]) -> list[tuple[float, float]]:
    """The rank of a LoRA of as many numbers as all supports, and k sqrt(f) of each weight."""
    rank = sum(map(_first_entries, spaces)) / sum(sum(space.weight_shape) for space in spaces)
    shares = []
    for space in spaces:
        entries, rows = _first_entries(space), space.weight_shape[0]
        shares.append((rank, entries / math.sqrt(_rows(space, entries) * rows) if entries else 1.0))
    return shares


def _shares_spread_evenly(spaces: list[UnitSpace], weights: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """The same, both over the density, for entries at one density over the rows of all weights."""
    even = sum(m * n for m, n in weights) / sum(m + n for m, n in weights)
    return [(even, float(space.weight_shape[1])) for space in spaces]


def _rank_of_both_halves(spaces: list[UnitSpace]) -> float:
    """:math:`R`: the rank of a LoRA of as many numbers as the factors and the supports."""
    numbers = [sum(space.weight_shape) for space in spaces]
    ranks = [space.layer.sizes[space.adapter].rank for space in spaces]
    factors = sum(rank * count for rank, count in zip(ranks, numbers, strict=True))
    return sum(map(_first_entries, spaces)) / sum(numbers) + factors / sum(numbers)


def _by_gradient(config: PeftConfig) -> bool:
    """Whether gradients choose the first support."""
    if isinstance(config.start, GradientSplit):
        return True
    return isinstance(config.criterion, DataCriterion) and not isinstance(config.criterion, Activation)


def _scale_of(config: PeftConfig) -> float:
    """alpha / r, or over the root of r, as the config has them before data gives each module a rank of its own."""
    if not config.r:
        return CUSTOMARY_SCALE
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def _first_entries(space: UnitSpace) -> float:
    """Entries that a support or a subnet starts with."""
    if space.kind == "subnet_row":
        return float(space.layer.sizes[space.adapter].subnet[0] * space.layer.sizes[space.adapter].subnet[1])
    return float(space.initial * space.unit_entries)


def _rows(space: UnitSpace, entries: float) -> float:
    """Rows of the weight that as many entries, in units at random, are expected to lie in."""
    rows, columns = space.weight_shape
    if space.kind == "subnet_row":
        return float(space.layer.sizes[space.adapter].subnet[0])
    if space.unit in ("column", "diagonal"):
        return float(rows)
    if space.unit == "row":
        return entries / columns
    side = math.sqrt(space.unit_entries)  # 1 for entries
    share = space.pattern.rows if isinstance(space.pattern, Grid) else 1.0
    strips = max(share * rows / side, 1.0)
    return share * rows * (1 - (1 - 1 / strips) ** (entries / space.unit_entries))
