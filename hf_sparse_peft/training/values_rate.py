r"""The learning rate of sparse values relative to that of low-rank factors, so that LoRA's rate works unchanged.

A step of Adam moves every trained number by about the learning rate :math:`\eta`. A LoRA's step then moves an output
:math:`y_i = w_i^\top x` by about :math:`\eta\,s\,r\,|x| / \sqrt 3`, with :math:`s = \alpha / r` (:math:`A` starts
uniform with variance :math:`1/3n`, and all of :math:`B` moves along the gradient), whatever the weight's shape. A step
of a support moves it by :math:`\eta_S\,k\,|x|`, where :math:`k` entries lie in row :math:`i`: over all rows, of which a
share :math:`f` has any, the root mean square is :math:`k \sqrt f`. A support of as many numbers as a LoRA of rank
:math:`r_S` moves outputs as far as that LoRA where

.. math:: \rho = \frac{\eta_S}{\eta} = c\,\frac{s\,r_S}{k \sqrt f}, \qquad r_S = \frac{\sum |S|}{\sum (m + n)}

with sums over all adapted :math:`[m, n]` weights. So for entries at one density :math:`\rho` does not depend on how
many they are, and falls with the fan-in; for rows it grows with the root of their number. :math:`c` is measured
(`recipes/benchmarks/learning.py`; docs/learning.md has the fit and its test): it is smaller where a gradient chose the
units, since these have the largest inputs and keep their signs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from peft import PeftConfig

from ..rules import UnitSpace
from ..sparsity import DataCriterion

CONSTANTS = {
    "entry": (1.8, 0.27),
    "block": (1.8, 0.27),
    "column": (1.8, 0.5),
    "row": (1.8, 1.8),
    "diagonal": (1.8, 1.8),
}
""":math:`c` by granularity: of supports that no gradient has chosen, and of those that one has."""


def rows_and_entries(space: UnitSpace) -> tuple[float, float]:
    """Expected rows of the weight that a support of that many random units has entries in, and its entries."""
    rows, columns = space.weight_shape
    if space.kind == "subnet_row":
        return float(space.capacity), float(space.capacity * space.unit_numel)
    units, entries = space.initial, float(space.initial * space.unit_entries)
    if space.unit == "row":
        return float(units), entries
    if space.unit in ("column", "diagonal"):
        return float(rows), entries
    side = rows * columns / space.size if space.unit == "entry" else math.sqrt(space.unit_entries)
    strips = rows / side
    return rows * (1 - (1 - 1 / strips) ** units), entries


def values_ratios(adapters: Iterable[tuple[PeftConfig, UnitSpace]]) -> dict[int, float]:
    r""":math:`\rho` of the values of supports and subnets by their parameter's id, from the sizes that they start with.

    Args:
        adapters: Unit spaces with the config of their adapter: "support" and "subnet_row" of all active adapters.
    """
    by_adapter: dict[str, list[tuple[PeftConfig, UnitSpace]]] = {}
    for config, space in adapters:
        by_adapter.setdefault(space.adapter, []).append((config, space))
    found = {}
    for pairs in by_adapter.values():
        sizes = [rows_and_entries(space) for _, space in pairs]
        rank = sum(entries for _, entries in sizes) / sum(sum(space.weight_shape) for _, space in pairs)
        for (config, space), (touched, entries) in zip(pairs, sizes, strict=True):
            by_gradient = isinstance(getattr(config, "criterion", None), DataCriterion)
            c = CONSTANTS.get(space.unit, CONSTANTS["entry"])[by_gradient]
            spread = entries / math.sqrt(touched * space.weight_shape[0])  # k sqrt(f)
            ratio = c * _scale(config) * rank / spread if spread else 1.0
            found |= {id(parameter): ratio for parameter in space.parameters()}
    return found


def _scale(config: PeftConfig) -> float:
    """The low-rank half's scaling; 2, the customary one, without such a half."""
    if not config.r:
        return 2.0
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
