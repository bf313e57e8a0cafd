"""`sparse-peft methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import methods
from ..preflight import families, method_rows, methods_table
from ..utils.tables import show
from .app import verb
from .options import Json, print_json


def _names(incomplete: str) -> list[str]:
    return [name for name in methods.names() if name.startswith(incomplete)]


def _families(incomplete: str) -> list[str]:
    return [name for name in families() if name.startswith(incomplete)]


@verb("methods", panel="Before training")
def list_methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METHOD ...]",
            help="Some of them; all without it.",
            show_default=False,
            autocompletion=_names,
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Those of one family, such as sparse-moving.", show_default=False, autocompletion=_families),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG",
            help="Count what each trains, at its own defaults, on a model: a config.json, its folder or a Hub id.",
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as the documentation has it.")] = False,
    functions: Annotated[
        bool, typer.Option("--functions", help="List the methods that are functions of models and weights, no configs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the methods by name: family, what moves, source, 4-bit support, what they leave as, trained numbers; then
    those that are functions, with what to call."""
    if functions:
        _list_functions(markdown, as_json)
        return
    if markdown:
        print(methods.markdown_table())
        return
    rows = method_rows(names, family=family, model=model, show_progress=model is not None)
    if as_json:
        print_json(rows)
        return
    show(methods_table(rows))
    for row in rows:
        if row.problem:
            print(f"{row.name}: {row.problem}")
    if not (names or family or model):
        print()
        show(methods.functions_table())


def _list_functions(markdown: bool, as_json: bool) -> None:
    if markdown:
        print(methods.functions_markdown())
    elif as_json:
        rows = methods.FUNCTIONS.values()
        print_json([{"name": row.name, "paper": row.paper, "call": row.call, "does": row.does} for row in rows])
    else:
        show(methods.functions_table())
