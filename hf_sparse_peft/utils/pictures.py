"""Pictures: the one heat map, figures without a window, files written whole, and SVG that takes a page's colours."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .file_writing import whole_file

INK, SERIES = "#010203", tuple(f"#0a0b{number:02x}" for number in range(6))
"""Colours that stand for the page's: of text and axes, and of curves. `svg_of` puts `currentColor` and the variables
`--series-1`, ... in their place."""
_MOST_LABELS, _MOST_NUMBERS = 60, 400


def new_figure(width: float, height: float, what: str = "The picture") -> Any:
    """A matplotlib figure of so many inches that no window and no global state knows of.

    Raises:
        ImportError: matplotlib is not installed; names `what`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install matplotlib.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map(
    axis: Any,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str] | Sequence[float],
    *,
    top: float | None = None,
    power: float = 1.0,
    label: str | None = "",
    numbers: str | None = None,
) -> Any:
    """Draw a table as colours on a matplotlib axis, the first row above; returns what a colour bar is made of.

    Args:
        axis: where.
        values: `[rows, columns]`; NaN leaves a cell empty.
        rows: a name each; of many, some are written.
        columns: a name each or, for columns that are stretches of a number, their edges: one more than columns.
        top: end of the colours; None: the largest value. They begin at 0.
        power: colours follow the value to this power, so that small ones still show beside large ones.
        label: at the colour bar; None: without one.
        numbers: format of the value in each cell, e.g. "g"; not written where there are many cells.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm

    values = np.asarray(values, dtype=float)
    stretches = len(columns) == values.shape[1] + 1
    edges = np.asarray(columns, dtype=float) if stretches else np.arange(values.shape[1] + 1)
    largest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    norm = PowerNorm(power, vmin=0, vmax=top or max(largest, 1e-9))
    mesh = axis.pcolormesh(edges, np.arange(len(rows) + 1), values, cmap="viridis", norm=norm, rasterized=True)
    shown = range(0, len(rows), max(1, math.ceil(len(rows) / _MOST_LABELS)))
    axis.set_yticks([row + 0.5 for row in shown], [rows[row] for row in shown], fontsize=7 if len(rows) > 20 else 8)
    axis.set_ylim(len(rows), 0)
    if not stretches:
        slanted = {"rotation": 45, "ha": "right"} if max(map(len, columns), default=0) > 4 else {}
        axis.set_xticks([column + 0.5 for column in range(len(columns))], columns, **slanted)
    if numbers is not None and values.size <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                colour = "white" if norm(value) < 0.6 else "black"
                place = (edges[column] + edges[column + 1]) / 2
                axis.text(place, row + 0.5, format(value, numbers), ha="center", va="center", fontsize=7, color=colour)
    if label is not None:
        axis.figure.colorbar(mesh, ax=axis, label=label, pad=0.01).solids.set_rasterized(True)
    return mesh


def layer_label(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `3.q_proj`."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number}.{parts[-1]}" if number else parts[-1]


def says_something(values: Any, tolerance: float = 0.0) -> bool:
    """Whether numbers differ by more than `tolerance` of the largest: a picture of equal ones says less than a sentence
    does."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    return values.size > 0 and float(np.ptp(values)) > tolerance * float(np.abs(values).max())


def save_picture(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a matplotlib figure, whole or not at all; a disk that has no room is warned about, not raised: a picture
    is no reason to end the script that trained what it shows."""
    try:
        with whole_file(path) as file:
            figure.savefig(file, dpi=dpi)
    except OSError as error:
        warnings.warn(f"The picture '{path}' could not be written ({error}).", stacklevel=3)


def svg_of(draw: Any, width: float, height: float, name: str) -> str:
    """An `<svg>` for the inside of a page, in the page's colours and font.

    Args:
        draw: called with the figure; what it draws in `INK` and `SERIES` takes the colours of the page.
        width: inches.
        height: inches.
        name: what the picture shows, for readers that see none; also keeps the names inside apart from other pictures'.
    """
    import matplotlib

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style = {
        **dict.fromkeys((*ink, "grid.color", "legend.labelcolor"), INK),
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "grid.alpha": 0.25,
        "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = new_figure(width, height, "The report")
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
    for number, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{number + 1})")
    return svg.replace(INK, "currentColor")
