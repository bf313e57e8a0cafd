"""A number for every adapted module as a picture: blocks of the model over kinds of matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from ...utils.pictures import heat_map, new_figure, save_picture


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
    places = {name: _place(name) for name in values}
    blocks = sorted({block for block, _ in places.values()}, key=lambda block: (block is None, block))
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = [[math.nan] * len(kinds) for _ in blocks]
    for name, value in values.items():
        block, kind = places[name]
        grid[blocks.index(block)][kinds.index(kind)] = value
    figure = new_figure(2.5 + 0.9 * len(kinds), 2.2 + 0.28 * len(blocks))
    axis = figure.subplots()
    rows = ["-" if block is None else str(block) for block in blocks]
    heat_map(axis, grid, rows, kinds, top=top, label=label, numbers="g")
    axis.set_ylabel("block")
    axis.set_title(title, fontsize=10)
    save_picture(figure, path, dpi=130)
    return Path(path)


def _place(name: str) -> tuple[int | None, str]:
    number = re.search(r"\.(\d+)\.", name)
    return (int(number.group(1)) if number else None), name[number.end() :].rpartition(".")[2] if number else name
