"""Methods whose units are structures of a transformer block: channels, heads, whole matrices, layers."""

from __future__ import annotations

from typing import Any

from ..tuners import SparseLoraConfig, StructureConfig
from .registry import Method, register

_ROWS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "row")
_COLUMNS = dict.fromkeys(("o_proj", "down_proj"), "column")


@register(
    "s2ft",
    paper="Yang et al., 2024",
    moves="nothing",
    use_when="training should be fast and leave as a plain LoRA: a few whole channels or heads learn",
    cost="none; keeps only the chosen columns of the input for the backward pass",
)
def s2ft(
    down: float = 0.03,
    up: float = 0.0,
    gate: float = 0.0,
    o: float = 0.0,
    v: float = 0.0,
    channels: float = 0.0,
    heads: float = 0.0,
    scope: str = "model",
    **overrides: Any,
) -> Method:
    """Columns of `down_proj` drawn over all layers together, as published; `up`, `gate`, `v` choose rows, `o` columns.

    Each ratio selects by itself. `channels` instead couples gate, up and down (row c, row c, column c), and `heads`
    couples q, k, v and o by key/value head; they replace the ratios of the same matrices. `criterion` says how:
    `random` (default), `magnitude` or `smallest_magnitude` (sum of |w| over a structure). For models that name their
    matrices otherwise pass `structures`, `granularity_pattern` and `target_modules`.
    """
    ratios = {"down_proj": down, "up_proj": up, "gate_proj": gate, "o_proj": o, "v_proj": v}
    coupled = {
        ("gate_proj", "up_proj", "down_proj"): ("channel", channels),
        ("q_proj", "k_proj", "v_proj", "o_proj"): ("head", heads),
    }
    structures = []
    for names, (unit, density) in coupled.items():
        if density:
            structures.append(StructureConfig(list(names), unit, density, scope))
            ratios = {name: ratio for name, ratio in ratios.items() if name not in names}
    structures += [StructureConfig([n], "channel", ratio, scope) for n, ratio in ratios.items() if ratio]
    options = {
        "r": 0,
        "density": 0.0,
        "structures": structures,
        "granularity_pattern": {**_ROWS, **_COLUMNS},
        "target_modules": [name for one in structures for name in one.modules],
        **overrides,
    }
    return Method(SparseLoraConfig(**options))
