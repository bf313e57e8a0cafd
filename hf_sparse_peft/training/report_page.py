"""A `RunRecord` as a page of HTML that stands alone and follows the reader's choice of dark or light."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..utils.file_writing import whole_file
from ..utils.pictures import SERIES, svg_of
from .panels import Panel, curve_panels, measure_panels, unit_panels
from .run_record import RunRecord

TEMPLATE = Path(__file__).with_name("report.html")
_WIDTH = 6.6


def write_report(record: RunRecord, path: str | Path) -> Path:
    """Write a run as one page of HTML that needs nothing else; returns `path`.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    page = report_page(record)
    with whole_file(path) as file:
        file.write_text(page, encoding="utf-8")
    return Path(path)


def report_page(record: RunRecord) -> str:
    """The page. What is the same everywhere is said in a line below the pictures; what was not recorded is not there.

    Raises:
        ImportError: matplotlib is not installed.
    """
    sections = [
        ("Losses and measures", curve_panels(record.log, SERIES)),
        ("Units", unit_panels(record.support, SERIES)),
        ("Time and memory", measure_panels(record.measured, record.estimate, SERIES)),
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=record.title or "A run",
        figures=record.metrics,
        tables=[(name, table) for name, table in _tables(record) if table],
        sections=[section for section in (_section(name, panels) for name, panels in sections) if section],
        number=lambda value: f"{value:.4g}",
    )


def _section(name: str, panels: Sequence[Panel]) -> dict[str, Any] | None:
    drawn = [(panel.title, _picture(panel)) for panel in panels if panel.draw is not None]
    said = [panel.instead for panel in panels if panel.draw is None and panel.instead]
    return {"name": name, "pictures": drawn, "said": said} if drawn or said else None


def _picture(panel: Panel) -> Markup:
    return Markup(svg_of(lambda figure: panel.draw(figure.subplots()), _WIDTH, panel.height, panel.title))


def _tables(record: RunRecord) -> list[tuple[str, dict[str, str]]]:
    moves: dict[str, list[int]] = {}
    for event in record.events:
        moves.setdefault(event["rule"], []).append(event["step"])
    told = {
        rule: f"{len(steps)} times, first at step {min(steps):,}, last at step {max(steps):,}"
        for rule, steps in moves.items()
    }
    return [("Run", record.facts), ("Cost", record.cost), ("What rules did", told), ("Made with", record.environment)]
