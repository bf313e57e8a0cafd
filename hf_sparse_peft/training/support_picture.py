"""`draw_support_history`: what `SupportTelemetryCallback` recorded, as a picture."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from ..utils.file_writing import whole_file

_HEAT_MAPS = (
    ("density", "density: living units [% of the weight's]", 100.0, None),
    ("churn", "churn: units that were not there at the last record [% of the living]", 100.0, 100.0),
    ("overlap", "units left from the start [% of the living]", 100.0, 100.0),
    ("rank", "rank: living components", 1.0, None),
    ("gradient_share", "gradient's square in the support [%]", 100.0, None),
)


def draw_support_history(history: list[dict[str, Any]], path: str | Path, title: str = "") -> Path:
    """Write a picture (PNG, PDF, SVG by the ending of `path`) of a `SupportTelemetryCallback.history`; returns `path`.

    Heat maps, layers over steps, of density, churn, overlap with the start, rank, gradient share and living units of
    other kinds, as far as recorded, and the ages of the whole model's units as quantiles. An adapter without units
    gives a picture that says so.

    A file that cannot be written is warned about and left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `history` is empty, or matplotlib does not know the ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_support_history needs matplotlib: pip install matplotlib.") from error
    if not history:
        raise ValueError("history is empty: pass the history of a SupportTelemetryCallback that took part in a run.")
    maps = [panel for panel in (*_HEAT_MAPS, *_other_kinds(history)) if any(record.get(panel[0]) for record in history)]
    ages = any(record.get("age") for record in history)
    panels = len(maps) + ages
    most_layers = max((len(record.get(key, ())) for record in history for key, *_ in maps), default=1)
    columns = 1 if panels < 2 else 2
    rows = math.ceil(max(panels, 1) / columns)
    figure = Figure(figsize=(8.5 * columns, rows * min(12.0, max(3.6, 1.4 + 0.17 * most_layers))), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (key, label, factor, top) in zip(axes, maps, strict=False):
        draw_heat_map(axis, history, key, label, factor, top)
    if ages:
        _draw_ages(axes[len(maps)], history)
    for axis in axes[panels:]:
        axis.set_axis_off()
    if not panels:
        axes[0].text(0.5, 0.5, "This adapter has no units to watch.", ha="center", va="center")
    save_picture(figure, path, dpi=110)
    return Path(path)


def _other_kinds(history: list[dict[str, Any]]) -> list[tuple[str, str, float, None]]:
    known = {"step", "model", "age", "age_source", *(key for key, *_ in _HEAT_MAPS)}
    kinds = dict.fromkeys(key for record in history for key in record if key not in known)
    return [(kind, f"{kind}: living units", 1.0, None) for kind in kinds]


def save_picture(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a matplotlib figure, whole or not at all; a disk that has no room is warned about, not raised: a picture
    is no reason to end the script that trained what it shows."""
    try:
        with whole_file(path) as file:
            figure.savefig(file, dpi=dpi)
    except OSError as error:
        warnings.warn(f"The picture '{path}' could not be written ({error}).", stacklevel=3)


def draw_heat_map(
    axis, history: list[dict], key: str, label: str, factor: float = 1.0, top: float | None = None
) -> None:
    """Layers over steps on a matplotlib axis; `top` fixes the upper end of the colours, records without `key` are left
    out."""
    import numpy as np
    from matplotlib.colors import PowerNorm

    records = [record for record in history if record.get(key)]
    if key == "churn" and len(records) > 1:
        records = records[1:]  # the first has nothing before it
    layers = list(records[-1][key])
    steps = [record["step"] for record in records]
    values = factor * np.array(
        [[record[key].get(layer, np.nan) for record in records] for layer in layers], dtype=float
    )
    # A record's column ends at its step: it says what happened up to there.
    width = (steps[1] - steps[0]) / 3 if len(steps) > 1 else 1
    edges = np.array([0 if steps[0] else -width, *steps], dtype=float)
    # Where a first move replaces everything, later ones of a few percent must still show.
    norm = PowerNorm(0.5 if top else 1.0, vmin=0, vmax=top or max(float(np.nanmax(values)), 1e-9))
    mesh = axis.pcolormesh(edges, np.arange(len(layers) + 1), values, cmap="viridis", norm=norm)
    every = max(1, math.ceil(len(layers) / 60))
    shown = range(0, len(layers), every)
    axis.set_yticks([row + 0.5 for row in shown], [_short(layers[row]) for row in shown], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", title=label)
    axis.figure.colorbar(mesh, ax=axis)


def _draw_ages(axis, history: list[dict]) -> None:
    import numpy as np

    records = [record for record in history if any(record.get("age", {}).values())]
    steps = [record["step"] for record in records]
    # [records, 5]: each quantile, averaged over the layers.
    curves = np.array([np.mean([ages for ages in record["age"].values() if ages], axis=0) for record in records])
    axis.fill_between(steps, curves[:, 0], curves[:, 4], alpha=0.15, color="tab:blue", label="youngest to oldest")
    axis.fill_between(steps, curves[:, 1], curves[:, 3], alpha=0.35, color="tab:blue", label="middle half")
    axis.plot(steps, curves[:, 2], color="tab:blue", label="median")
    axis.plot(steps, steps, "--", color="grey", linewidth=1, label="there from the start")
    source = records[-1].get("age_source")
    origin = "the optimizer's count" if source == "optimizer" else "since it entered"
    axis.set(xlabel="optimizer step", ylabel="updates", title=f"age of a unit ({origin}), mean over layers")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _short(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `3.q_proj`."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number}.{parts[-1]}" if number else parts[-1]
