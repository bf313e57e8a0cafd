"""Tables of text: `print(table(...))` anywhere, styled where a terminal shows them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import rich.table
from rich.console import Console
from rich.text import Text


class Table(rich.table.Table):
    """A rich table whose `str()` is aligned text in its natural width, without colour, as files and pipes take it."""

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False)
        console.print(self)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, totals: Sequence[Any] | None = None) -> Table:
    """A table with a head; columns of numbers alone are set to the right.

    Integers get commas, floats four digits, None a dash, True and False "yes" and "no"; strings stand as they are.

    Args:
        columns: the head.
        rows: a value for each column.
        totals: a last row for the whole, in bold.
    """
    body = [*rows, *([totals] if totals is not None else [])]
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for at, name in enumerate(columns):
        numbers = all(_is_number(row[at]) for row in rows) and any(row[at] is not None for row in rows)
        made.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in body:
        style = "bold" if totals is not None and row is body[-1] else None
        made.add_row(*(Text(cell(value)) for value in row), style=style)
    return made


def cell(value: Any) -> str:
    """One value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def show(content: Table | str) -> None:
    """Print to stdout: styled and fitted to the window on a terminal, plain and unbroken elsewhere."""
    console = Console()
    if console.is_terminal and not isinstance(content, str):
        console.print(content)
    else:
        print(content)
