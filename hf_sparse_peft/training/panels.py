"""What a run can be drawn as: curves of its log, heat maps of its units over time, where its numbers went."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..utils.pictures import SERIES, heat_map, layer_label, says_something
from .run_record import SPEED

NUMBERS = "numbers/"
"""Begins the fields of a telemetry record that count trained numbers, one a kind of unit."""
_HEAT_MAPS = (
    ("density", "density: living units [% of the weight's]", 100.0, None),
    ("churn", "churn: units that were not there at the last record [% of the living]", 100.0, 100.0),
    ("overlap", "units left from the start [% of the living]", 100.0, 100.0),
    ("rank", "rank: living components", 1.0, None),
    ("gradient_share", "gradient's square in the support [%]", 100.0, None),
)
_MOST_BANDS = 6
_FLAT = 0.01
"""Relative difference up to which a heat map shows one colour: whole numbers of units in layers of several sizes."""


@dataclass(frozen=True)
class Panel:
    """One picture of a run, or why there is none."""

    title: str
    draw: Callable[[Any], None] | None = field(default=None, repr=False)
    """Draws it on a matplotlib axis; None: it would say nothing."""
    instead: str = ""
    """What to say in its place; empty: nothing was recorded."""
    height: float = 3.4
    """Inches."""


def unit_panels(history: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> list[Panel]:
    """Layers over steps, for everything that telemetry has recorded of units, their ages and the budget's flow."""
    if not history:
        return []
    known = {"step", "model", "age", "age_source", *(key for key, *_ in _HEAT_MAPS)}
    others = dict.fromkeys(key for record in history for key in record if key not in known)
    kinds = [(key, f"{key}: living units", 1.0, None) for key in others if not key.startswith(NUMBERS)]
    maps = [_map_panel(history, *one) for one in (*_HEAT_MAPS, *kinds) if any(record.get(one[0]) for record in history)]
    return [*maps, *_age_panel(history, colours), *_flow_panel(history, colours)]


def curve_panels(log: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> list[Panel]:
    """Losses in one panel, each measure of the evaluations in one of its own, and the gradient's norm."""
    curves = {"training": points(log, "loss"), "evaluation": points(log, "eval_loss")}
    named = dict.fromkeys(key for record in log for key in record if key.startswith("eval_") and key != "eval_loss")
    measures = {key: points(log, key) for key in named if not key.endswith(SPEED)}
    panels = [_curves("loss", curves, "loss", colours, log_scale=True)]
    panels += [_curves(key.removeprefix("eval_"), {"evaluation": one}, "", colours) for key, one in measures.items()]
    panels.append(_curves("norm of the gradient", {"": points(log, "grad_norm")}, "norm", colours, log_scale=True))
    return [panel for panel in panels if panel.draw or panel.instead]


def points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Steps and values of `key`, of those records that have a finite number there."""
    found = [(record["step"], record[key]) for record in log if "step" in record and _is_number(record.get(key))]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _curves(
    title: str,
    curves: Mapping[str, list[tuple[float, float]]],
    label: str,
    colours: Sequence[str],
    log_scale: bool = False,
) -> Panel:
    curves = {name: one for name, one in curves.items() if one}
    single = [one for one in curves.values() if len(one) > 1 and says_something([value for _, value in one])]
    if not single:
        said = ", ".join(f"{name} {one[-1][1]:.4g}".strip() for name, one in curves.items())
        return Panel(title, instead=f"{title}: {said}" if said else "")

    def draw(axis: Any) -> None:
        for colour, (name, one) in zip(colours, curves.items(), strict=False):
            style = "-" if len(one) > 30 else "o-"
            axis.plot(*zip(*one, strict=True), style, color=colour, label=name, markersize=3.5, linewidth=1.6)
        values = [value for one in curves.values() for _, value in one]
        if log_scale and min(values) > 0 and max(values) > 10 * min(values):
            axis.set_yscale("log")
        axis.set(xlabel="optimizer step", ylabel=label, title=title)
        axis.grid(True)
        if len(curves) > 1:
            axis.legend()

    return Panel(title, draw)


def over_time(history: Sequence[Mapping[str, Any]], key: str, factor: float = 1.0) -> tuple[list[str], Any, Any]:
    """Layers, the edges of the records' stretches, and `[layers, records]` values of one field.

    A record's column ends at its step, because it says what happened up to there; the first of a run, at step 0, gets a
    narrow one of its own.
    """
    import numpy as np

    records = [record for record in history if record.get(key)]
    if key == "churn" and len(records) > 1:
        records = records[1:]  # the first has nothing before it
    layers, steps = list(records[-1][key]), [record["step"] for record in records]
    values = [[record[key].get(layer, np.nan) for record in records] for layer in layers]
    width = (steps[1] - steps[0]) / 3 if len(steps) > 1 else 1
    return layers, np.array([0 if steps[0] else -width, *steps], dtype=float), factor * np.array(values, dtype=float)


def _map_panel(history: Sequence[Mapping[str, Any]], key: str, label: str, factor: float, top: float | None) -> Panel:
    import numpy as np

    layers, edges, values = over_time(history, key, factor)
    what, _, unit = label.partition("[")
    if not says_something(values, _FLAT):
        least, most = f"{np.nanmin(values):.4g}", f"{np.nanmax(values):.4g}"
        number = (least if least == most else f"{least} to {most}") + (f" {unit.rstrip(']')}" if unit else "")
        return Panel(key, instead=f"{what.strip()}: {number} in every layer at every record")

    def draw(axis: Any) -> None:
        # Where a first move replaces everything, later ones of a few percent must still show.
        heat_map(axis, values, [layer_label(name) for name in layers], edges, top=top, power=0.5 if top else 1.0)
        axis.set(xlabel="optimizer step", title=label)

    return Panel(key, draw, height=min(12.0, max(3.0, 1.4 + 0.15 * len(layers))))


def _age_panel(history: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> list[Panel]:
    import numpy as np

    records = [record for record in history if any(record.get("age", {}).values())]
    if not records:
        return []
    steps = [record["step"] for record in records]
    # [records, 5]: each quantile, averaged over the layers.
    curves = np.array([np.mean([ages for ages in record["age"].values() if ages], axis=0) for record in records])
    source = "the optimizer's count" if records[-1].get("age_source") == "optimizer" else "since it entered"
    if np.array_equal(curves, np.repeat(np.array(steps, dtype=float)[:, None], curves.shape[1], axis=1)):
        return [Panel("age", instead=f"age of a unit ({source}): every unit was there from the start")]

    def draw(axis: Any) -> None:
        axis.fill_between(steps, curves[:, 0], curves[:, 4], alpha=0.15, color=colours[0], label="youngest to oldest")
        axis.fill_between(steps, curves[:, 1], curves[:, 3], alpha=0.35, color=colours[0], label="middle half")
        axis.plot(steps, curves[:, 2], color=colours[0], label="median")
        axis.plot(steps, steps, "--", color=colours[1], linewidth=1, label="there from the start")
        axis.set(xlabel="optimizer step", ylabel="updates", title=f"age of a unit ({source}), mean over layers")
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=8)

    return [Panel("age", draw)]


def budget_flow(history: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[int]]]:
    """Steps, and the trained numbers of living units over them: by kind of unit and of module ("rank of q_proj")."""
    fields = list(dict.fromkeys(key for record in history for key in record if key.startswith(NUMBERS)))
    records = [record for record in history if any(record.get(key) for key in fields)]
    groups: dict[str, list[int]] = {}
    for at, record in enumerate(records):
        for key in fields:
            for layer, count in record.get(key, {}).items():
                name = f"{key.removeprefix(NUMBERS)} of {layer.partition(':')[0].rpartition('.')[2]}"
                groups.setdefault(name, [0] * len(records))[at] += count
    return [record["step"] for record in records], groups


def _flow_panel(history: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> list[Panel]:
    steps, groups = budget_flow(history)
    if not groups:
        return []
    title = "budget: trained numbers of living units"
    if all(len(set(counts)) == 1 for counts in groups.values()):
        whole = sum(counts[0] for counts in groups.values())
        return [Panel("budget", instead=f"{title}: {whole:,} at every record, none of which moved between modules")]
    by_change = sorted(groups, key=lambda name: min(groups[name]) - max(groups[name]))
    shown, rest = by_change[: _MOST_BANDS - 1], by_change[_MOST_BANDS - 1 :]
    bands = {name: groups[name] for name in shown}
    if len(rest) == 1:
        bands[rest[0]] = groups[rest[0]]
    elif rest:
        bands[f"{len(rest)} others"] = [sum(counts) for counts in zip(*(groups[name] for name in rest), strict=True)]

    def draw(axis: Any) -> None:
        axis.stackplot(steps, list(bands.values()), labels=list(bands), colors=list(colours), alpha=0.8)
        axis.set(xlabel="optimizer step", ylabel="numbers", title=title)
        axis.set_xlim(steps[0], steps[-1])
        handles, names = axis.get_legend_handles_labels()
        axis.legend(handles[::-1], names[::-1], fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return [Panel("budget", draw)]


def measure_panels(
    records: Sequence[Mapping[str, Any]], estimate: Mapping[str, float], colours: Sequence[str] = SERIES
) -> list[Panel]:
    """Time of a step and memory, each beside what was estimated."""
    found = []
    for key, title, label, factor in (
        ("seconds", "time of a step", "milliseconds", 1e3),
        ("gpu_bytes", "memory of the GPU, highest so far", "GB", 1e-9),
        ("process_bytes", "memory of the process", "GB", 1e-9),
    ):
        values = [(step, factor * value) for step, value in points(records, key)]
        if not values:
            continue
        wanted = estimate.get(key)
        panel = _curves(title, {"measured": values}, label, colours)
        if panel.draw is not None:
            panel = _from_zero(panel, None if wanted is None else factor * wanted, colours[1])
        elif wanted is not None:
            panel = Panel(title, instead=f"{panel.instead} {label}, estimated {factor * wanted:.4g}")
        elif panel.instead:
            panel = Panel(title, instead=f"{panel.instead} {label}")
        found.append(panel)
    return found


def _from_zero(panel: Panel, estimate: float | None, colour: str) -> Panel:
    def draw(axis: Any) -> None:
        panel.draw(axis)
        if estimate is not None:
            axis.axhline(estimate, color=colour, linestyle="--", label=f"estimated: {estimate:.4g}")
            axis.legend()
        axis.set_ylim(bottom=0)

    return Panel(panel.title, draw, height=panel.height)
