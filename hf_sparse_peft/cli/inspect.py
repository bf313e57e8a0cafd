"""`sparse-peft inspect` and `sparse-peft diff`: what lies in adapter folders, read without their base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..hub import check_adapter
from ..hub.analysis import adapter_difference
from ..merging import unpacked
from ..utils.plain_data import plain_data
from ..utils.tables import show
from .app import verb
from .options import Adapter, Json, Picture, print_json


@verb("inspect", panel="Look into adapters", aliases={"of": "--of"})
def inspect(
    adapter: Adapter,
    modules: Annotated[bool, typer.Option("--modules", help="A line for each module, not for each kind.")] = False,
    plot: Picture = None,
    of: Annotated[
        Literal["density", "rank", "parameters"] | None,
        typer.Option(help="What --plot draws; without it the first of these that there is.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every tensor of an adapter folder and show what it holds."""
    if of and plot is None:
        raise typer.BadParameter("--of says what --plot draws; pass --plot FILE too.")
    report = check_adapter(adapter)
    if as_json:
        extra = {"density": report.density, "parameters": report.parameters, "groups": plain_data(report.groups())}
        print_json({**plain_data(report), **extra})
    else:
        show(report.table("module" if modules else "group"))
        print(f"\n{report.parameters:,} living parameters; {report.other_bytes:,} bytes beside the adapted modules.")
    if plot is not None:
        file = report.draw(plot, of)
        if not as_json:
            print(f"picture in {file}")


@verb("diff", panel="Look into adapters")
def diff(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="Adapter folder, or a ComPEFT or BitDelta file.", show_default=False)
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another of the same base.", show_default=False)],
    plot: Picture = None,
    as_json: Json = False,
) -> None:
    """Show what differs between two adapters: options, supports, updates."""
    with unpacked(first) as one, unpacked(second) as two:
        found = adapter_difference(one, two)
    if as_json:
        overlap = found.overlap
        totals = overlap and {"repeated": overlap.repeated, "chance": overlap.chance}
        print_json({"equal": found.equal, "overlap": totals, **plain_data(found)})
    else:
        if found.config:
            show(found.options_table())
            print()
        show(found.table())
        for folder, names in ((first, found.only_first), (second, found.only_second)):
            if names:
                print(f"only in {folder}: {', '.join(names)}")
        for name, norm in found.others.items():
            if norm:
                print(f"{name}: norm of the difference {norm:.4g}")
        if found.equal:
            print("Both change the base alike.")
    if plot is not None:
        file = found.draw(plot)
        if not as_json:
            print(f"picture in {file}")
