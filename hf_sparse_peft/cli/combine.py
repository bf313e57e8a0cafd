"""`sparse-peft combine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..hub import combine_adapters
from ..tuners.shared.combination import COMBINATION_TYPES
from .app import verb
from .options import Base, Json, print_json


def _numbers(value: Any) -> list[float]:
    try:
        return [float(part) for part in str(value).split(",")]
    except ValueError:
        raise typer.BadParameter(f"{value!r} is no list of numbers, as in 0.7,0.3.") from None


def _kinds(incomplete: str) -> list[str]:
    return [kind for kind in COMBINATION_TYPES if kind.startswith(incomplete)]


@verb(
    "combine",
    panel="Take adapters elsewhere",
    aliases={"combination_type": "--type", "svd_rank": "--rank", "paths": "", "modules_to_save_from": "--heads-from"},
)
def combine(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Adapter folders of one base.", show_default=False)
    ],
    weights: Annotated[
        Any,
        typer.Option(parser=_numbers, metavar="W,W,...", help="A weight for each adapter.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    kind: Annotated[
        str, typer.Option("--type", autocompletion=_kinds, help=f"How: {', '.join(COMBINATION_TYPES)}.")
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option(help="svd: rank of the combination; without it the largest.", show_default=False)
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="ties, dare, magnitude_prune: fraction of values to keep.", show_default=False)
    ] = None,
    heads_from: Annotated[
        str | None, typer.Option(help="Adapter whose heads are taken, if they differ.", show_default=False)
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write a weighted sum of adapters as a new adapter."""
    options = {"svd_rank": rank, "density": density, "modules_to_save_from": heads_from}
    folder = combine_adapters(adapters, out, weights, base=base, combination_type=kind, **options)
    size = (folder / "adapter_model.safetensors").stat().st_size
    if as_json:
        print_json({"path": folder, "file_bytes": size})
    else:
        print(f"{len(adapters)} adapters combined, {size:,} bytes in {folder}")
