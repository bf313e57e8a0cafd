"""The table that a fine-tuning run ends with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_table(rows: list[tuple[str, str, str]], title: str) -> None:
    """Print `(figure, before, after)` rows."""
    table = Table(title=title)
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)
