"""`sparse-peft combine`: weighted sums of adapters, and merge methods by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from ..hub import combine_adapters
from ..merging import MergeReport, merge_adapters, merge_info, merge_names
from ..tuners.shared.combination import COMBINATION_TYPES
from ..utils.tables import show, table
from .app import verb
from .options import Base, Json, print_json


def _numbers(value: Any) -> list[float]:
    try:
        return [float(part) for part in str(value).split(",")]
    except ValueError:
        raise typer.BadParameter(f"{value!r} is no list of numbers, as in 0.7,0.3.") from None


def _kinds(incomplete: str) -> list[str]:
    return [kind for kind in COMBINATION_TYPES if kind.startswith(incomplete)]


def _methods(incomplete: str) -> list[str]:
    return [name for name in merge_names() if name.startswith(incomplete)]


def _list_methods(wanted: bool) -> None:
    if wanted:
        infos = [merge_info(name) for name in merge_names()]
        show(table(("method", "source", "what it does"), [(one.name, one.paper, one.does) for one in infos]))
        raise typer.Exit


_BY_METHOD = "Methods (--method)"
_BY_TYPE = "Combinations of upstream's add_weighted_adapter (--type)"


@verb(
    "combine",
    panel="Take adapters elsewhere",
    aliases={
        "combination_type": "--type", "svd_rank": "--rank", "paths": "", "modules_to_save_from": "--heads-from",
    },
)  # fmt: skip
def combine(
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER...", help="Adapter folders of one base.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    weights: Annotated[
        Any,
        typer.Option(
            parser=_numbers,
            metavar="W,W,...",
            help="A weight for each adapter; needed without --method.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            autocompletion=_methods,
            help="Method of merging by name, e.g. ties; reads files only.",
            show_default=False,
            rich_help_panel=_BY_METHOD,
        ),
    ] = None,
    methods: Annotated[
        bool,
        typer.Option("--methods", callback=_list_methods, is_eager=True, help="List them.", rich_help_panel=_BY_METHOD),
    ] = False,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Option of the method, e.g. scale=1.1.",
            show_default=False,
            rich_help_panel=_BY_METHOD,
        ),
    ] = None,
    form: Annotated[
        Literal["adapter", "lora", "dense"],
        typer.Option(help="What --method writes: our adapter, a LoRA, a dense model.", rich_help_panel=_BY_METHOD),
    ] = "adapter",
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            autocompletion=_kinds,
            help=f"How, without --method: {', '.join(COMBINATION_TYPES)}.",
            rich_help_panel=_BY_TYPE,
        ),
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option(help="svd: rank of the combination; without it the largest.", show_default=False)
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="ties, dare, della, magnitude_prune: fraction of values to keep.", show_default=False),
    ] = None,
    heads_from: Annotated[
        str | None,
        typer.Option(
            help="Adapter whose heads are taken, if they differ; --method takes mean too.", show_default=False
        ),
    ] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Write several adapters as one: their weighted sum, or what a merge method makes of them."""
    if method is not None:
        given = _options(options, method, density)
        report = merge_adapters(
            adapters, out, method, weights=weights, form=form, rank=rank, heads_from=heads_from, base=base,
            show_progress=not as_json, **given,
        )  # fmt: skip
        _print_report(report, len(adapters), method, as_json)
        return
    if options or form != "adapter":
        raise typer.BadParameter("--set and --form are for --method; name one, e.g. --method ties.")
    if weights is None:
        raise typer.BadParameter("--weights is needed without --method: a number for each adapter, as in 0.7,0.3.")
    told = {"svd_rank": rank, "density": density, "modules_to_save_from": heads_from}
    folder = combine_adapters(adapters, out, weights, base=base, combination_type=kind, **told)
    size = (folder / "adapter_model.safetensors").stat().st_size
    if as_json:
        print_json({"path": folder, "file_bytes": size})
    else:
        print(f"{len(adapters)} adapters combined, {size:,} bytes in {folder}")


def _options(given: list[str] | None, method: str, density: float | None) -> dict[str, Any]:
    """`--set` and `--density` as options of the method; DARE's rate is what --density leaves."""
    found = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--set {one!r} is no NAME=VALUE, as in scale=1.1.")
        found[name] = yaml.safe_load(value)
    if density is not None:
        by_rate = method.startswith("dare")
        found.setdefault("rate" if by_rate else "density", 1 - density if by_rate else density)
    return found


def _print_report(report: MergeReport, adapters: int, method: str, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    worst = max(report.errors.values(), default=0.0)
    how = "exactly" if report.exact else f"with a relative error of at most {worst:.2e} in a module"
    if not report.exact:
        show(report.table())
    print(f"{adapters} adapters merged by {method}, {how}: {report.file_bytes:,} bytes in {report.path}")
