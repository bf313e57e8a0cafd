"""Supports of whole channels and heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..sparsity import DataCriterion, Magnitude, Score, SmallestMagnitude
from ..tuners import StructureConfig
from ..utils.parts import load_part_by_name
from .registry import Method, register, row

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
    criterion: str | Score = "random",
    largest: bool = True,
    **overrides: Any,
) -> Method:
    """Columns of `down_proj` drawn over all layers together, as published; `up` and `gate` choose rows. `o` and `v`
    choose whole heads: the columns of an attention head in `o_proj`, the rows of a key/value head in `v_proj`.

    Each ratio selects by itself. `channels` instead couples gate, up and down (row c, row c, column c), and `heads`
    couples q, k, v and o by key/value head; they replace the ratios of the same matrices. `criterion` and `largest` are
    the paper's selection strategies: `random` (its default), `magnitude` (weight norm), `activation`,
    `weighted_activation` (weight norm times activation norm) and `gradient`, the `largest` or the smallest. For models
    that name their matrices otherwise pass `structures`, `granularity_pattern` and `target_modules`.
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
    units = {"o_proj": "head", "v_proj": "head"}
    structures += [StructureConfig([n], units.get(n, "channel"), ratio, scope) for n, ratio in ratios.items() if ratio]
    targets, sides = [name for one in structures for name in one.modules], {**_ROWS, **_COLUMNS}
    if not {"structures", "target_modules"} & set(overrides):
        sides = {name: sides[name] for name in targets}
    options = {
        "r": 0,
        "density": 0.0,
        "structures": structures,
        "granularity_pattern": sides,
        "target_modules": targets,
        "criterion": criterion if largest else _smallest(criterion),
    }
    return row(overrides, **options)


def _smallest(criterion: str | Score) -> Score:
    """The score by which the smallest rank first."""
    score = load_part_by_name(Score, criterion, "criterion")
    if isinstance(score, Magnitude):
        return SmallestMagnitude()
    if not isinstance(score, DataCriterion):
        raise ValueError(
            f"largest=False turns a ranking round, and criterion='{score.part_type}' has none to turn. It goes with "
            "'magnitude', 'activation', 'weighted_activation' and 'gradient'."
        )
    return replace(score, largest=False)
