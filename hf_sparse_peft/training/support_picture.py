"""Pictures of runs: what `SupportTelemetryCallback` recorded, and a run at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..utils.pictures import new_figure, save_picture
from .panels import Panel, curve_panels, unit_panels

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red", "tab:grey")


def draw_support_history(history: list[dict[str, Any]], path: str | Path, title: str = "") -> Path:
    """Write a picture (PNG, PDF, SVG by the ending of `path`) of a `SupportTelemetryCallback.history`; returns `path`.

    Heat maps, layers over steps, of density, churn, overlap with the start, rank, gradient share and living units of
    other kinds, as far as recorded, the ages of the whole model's units as quantiles, and where trained numbers went.
    What is the same in every layer at every record is said in a line instead. An adapter without units gives a picture
    that says so.

    A file that cannot be written is warned about and left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `history` is empty, or matplotlib does not know the ending.
    """
    if not history:
        raise ValueError("history is empty: pass the history of a SupportTelemetryCallback that took part in a run.")
    panels = unit_panels(history, _COLOURS)
    return _draw(panels, path, title, "draw_support_history", nothing="This adapter has no units to watch.")


def draw_run(
    log_history: list[dict[str, Any]], support_history: list[dict[str, Any]], path: str | Path, title: str = ""
) -> Path:
    """Write a picture of a run at a glance: its losses, and density and rank of every layer over the steps; returns
    `path`.

    Args:
        log_history: `trainer.state.log_history`.
        support_history: `SupportTelemetryCallback.history`; may be empty.
        path: the file; PNG, PDF or SVG by its ending.
        title: above the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the ending.
    """
    units = [panel for panel in unit_panels(support_history, _COLOURS) if panel.title in ("density", "rank", "budget")]
    losses = [panel for panel in curve_panels(log_history, _COLOURS) if panel.title == "loss"]
    return _draw([*losses, *units], path, title, "draw_run", nothing="Nothing was logged.", columns=1)


def _draw(
    panels: Sequence[Panel], path: str | Path, title: str, what: str, nothing: str, columns: int | None = None
) -> Path:
    drawn = [panel for panel in panels if panel.draw is not None]
    said = [panel.instead for panel in panels if panel.draw is None and panel.instead]
    columns = columns or (1 if len(drawn) < 2 else 2)
    lines = [drawn[at : at + columns] for at in range(0, len(drawn), columns)]
    heights = [max(panel.height for panel in line) for line in lines] or [1.0]
    text = 0.3 * max(1, len(said)) if said or not drawn else 0.0
    figure = new_figure(8.5 * columns, sum(heights) + text + 0.4, what)
    if title:
        figure.suptitle(title)
    ratios = [*heights, text] if text else heights
    axes = figure.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios)
    for axis in axes.flatten()[len(drawn) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flatten(), drawn, strict=False):
        panel.draw(axis)
    if text:
        axes[-1][0].text(0, 0.5, "\n".join(said) or nothing, ha="left", va="center", fontsize=9)
    save_picture(figure, path, dpi=110)
    return Path(path)
