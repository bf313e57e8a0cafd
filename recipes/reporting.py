"""The table that a fine-tuning run ends with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_table(rows: list[tuple[str, ...]], title: str, columns: tuple[str, ...] = ("before", "after")) -> None:
    """Print `(figure, before, after)` rows, or others of a name and as many values as `columns`."""
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)
