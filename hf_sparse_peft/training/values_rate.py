r"""The learning rate of sparse values relative to that of low-rank factors, so that LoRA's rate works unchanged.

A step of Adam moves every trained number by about the learning rate :math:`\eta`. A LoRA's step then moves an output
:math:`y_i = w_i^\top x` by about :math:`\eta\,\alpha\,|x| / \sqrt 3` (:math:`A` starts uniform with variance
:math:`1/3n`, and all of :math:`B` moves along the gradient), whatever its rank. A step of a support moves it by
:math:`\eta_S\,k\,|x|`, where :math:`k` entries lie in row :math:`i`: over all rows, of which a share :math:`f` has
any, the root mean square is :math:`k \sqrt f`. Rates at which both move outputs equally far have the ratio

.. math:: \rho = \frac{\eta_S}{\eta} = c\,\frac{\alpha}{k \sqrt f},

with :math:`\alpha` the config's `lora_alpha`. :math:`c` is measured (`recipes/benchmarks/learning.py`; docs/learning.md
has the fit and its test): it is smaller where a gradient chose the entries, since these have the largest inputs and
keep their signs.
"""

from __future__ import annotations

import math

from ..rules import UnitSpace

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


def values_ratio(space: UnitSpace, alpha: float, by_gradient: bool) -> float:
    r""":math:`\rho` of a support or subnet of one weight, from the size that it starts with.

    Args:
        space: Its unit space.
        alpha: `lora_alpha` of its config; also without a low-rank half, for the LoRA whose rate is to be used.
        by_gradient: Whether a criterion that reads data chooses the first support.
    """
    touched, entries = rows_and_entries(space)
    spread = entries / math.sqrt(touched * space.weight_shape[0])  # k sqrt(f)
    return CONSTANTS.get(space.unit, CONSTANTS["entry"])[by_gradient] * alpha / spread
