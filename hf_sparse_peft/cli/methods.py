"""`sparse-peft methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..methods import describe, markdown_table, names
from ..utils.tables import show, table
from .app import verb
from .options import Json, print_json


@verb("methods", panel="Before training")
def list_methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as the documentation has it.")] = False,
    as_json: Json = False,
) -> None:
    """List the methods by name: what moves, source, cost."""
    if markdown:
        print(markdown_table())
        return
    rows = [describe(name) for name in names()]
    if as_json:
        kept = ("name", "paper", "moves", "use_when", "cost", "upstream")
        print_json([{key: getattr(info, key) for key in kept} for info in rows])
        return
    show(table(("method", "source", "what moves"), [(info.name, info.paper, info.moves) for info in rows]))
