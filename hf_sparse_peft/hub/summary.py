"""`adapter_summary`: what an adapter changes, read from its unit spaces, whatever its tuner."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..tuners import adapter_layers
from ..tuners.shared.counts import layer_counts


def adapter_summary(model: nn.Module, adapter_name: str = "default") -> list[dict[str, Any]]:
    """What an adapter changes, a row for each group of equally named modules of one shape, in model order.

    Keys: `group` (last part of the module names), `modules`, `rows`, `cols`, `spaces`, `density` (fraction of the
    weights' entries that living units are or contain; components of factors contain none) and `parameters` (trained
    numbers of living units). `spaces` has a dict for each kind of unit space that the group's layers have: `kind`
    ("support", "rank", ...), `unit` (what one unit is: "entry", "row", "component", ...), and summed over the group
    `alive` and `capacity` (units that there is room for).

    Raises:
        ValueError: `model` has no adapter of this package of that name, or a support is damaged.
    """
    groups: dict[tuple, dict[str, Any]] = {}
    for layer in adapter_layers(model, adapter_name=adapter_name):
        rows, cols = layer.out_features, layer.in_features
        counts = layer_counts(layer, adapter_name)
        spaces = counts.spaces
        name = layer.module_name.rpartition(".")[2]
        row = groups.setdefault(
            (name, rows, cols, *((space["kind"], space["unit"]) for space in spaces)),
            {"group": name, "modules": 0, "rows": rows, "cols": cols}
            | {"spaces": [space | {"alive": 0, "capacity": 0} for space in spaces], "density": 0.0, "parameters": 0},
        )
        row["modules"] += 1
        row["parameters"] += counts.living
        row["density"] += counts.density  # a mean in the end: all weights of a group have one size
        for total, space in zip(row["spaces"], spaces, strict=True):
            total["alive"] += space["alive"]
            total["capacity"] += space["capacity"]
    for row in groups.values():
        row["density"] /= row["modules"]
    return list(groups.values())
