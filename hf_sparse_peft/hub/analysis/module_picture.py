"""A number for every adapted module as a picture: blocks of the model over kinds of matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from ...training.support_picture import save_picture


def draw_modules(
    values: Mapping[str, float], path: str | Path, title: str, label: str, top: float | None = None
) -> Path:
    """Write a heat map of `values` (module name -> number; PNG, PDF, SVG by the ending of `path`); returns `path`.

    The first number in a name is its block; modules without one share the row "-". Cells say their number where there
    are few enough to read.

    Args:
        values: what to draw.
        path: the file.
        title: above the picture.
        label: what the numbers are, at the colour bar.
        top: end of the colour scale; None: the largest number.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: pip install matplotlib.") from error
    places = {name: _place(name) for name in values}
    blocks = sorted({block for block, _ in places.values()}, key=lambda block: (block is None, block))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = [[math.nan] * len(kinds) for _ in blocks]
    for name, value in values.items():
        block, kind = places[name]
        grid[blocks.index(block)][kinds.index(kind)] = value
    figure = Figure(figsize=(2.5 + 0.9 * len(kinds), 2.2 + 0.28 * len(blocks)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    axis.set_yticks(range(len(blocks)), ["-" if block is None else str(block) for block in blocks])
    axis.set_ylabel("block")
    axis.set_title(title, fontsize=10)
    if len(values) <= 400:
        middle = (top if top is not None else max(values.values(), default=1.0)) / 2
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    color = "white" if value < middle else "black"
                    axis.text(x, y, f"{value:g}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axis, label=label)
    save_picture(figure, path, dpi=130)
    return Path(path)


def _place(name: str) -> tuple[int | None, str]:
    number = re.search(r"\.(\d+)\.", name)
    return (int(number.group(1)) if number else None), name[number.end() :].rpartition(".")[2] if number else name
