"""`sparse-peft card`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..hub import adapter_card
from ..hub.card import GENERATED
from ..hub.saving import write_card
from .app import verb
from .options import Adapter, AdapterOnBase, Base, BaseKind, Dtype, Json, print_json

_LATER = {"show_default": False}


@verb("card", panel="Take adapters elsewhere", aliases={"metrics": "--metric", "training_data": "--data"})
def card(
    adapter: Adapter,
    write: Annotated[bool, typer.Option("--write", help="Write README.md into the folder, not to stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --write: over a card that somebody edited.")] = False,
    method: Annotated[str | None, typer.Option(help="Name of the method.", **_LATER)] = None,
    paper: Annotated[str | None, typer.Option(help="Where it is from.", **_LATER)] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A result; repeatable.", **_LATER)
    ] = None,
    evaluated_on: Annotated[str | None, typer.Option(help="What results were measured on.", **_LATER)] = None,
    data: Annotated[list[str] | None, typer.Option(help="Hub id of training data; repeatable.", **_LATER)] = None,
    notes: Annotated[str | None, typer.Option(help="A paragraph about training.", **_LATER)] = None,
    license: Annotated[str | None, typer.Option(help="Hub licence id, e.g. apache-2.0.", **_LATER)] = None,
    repo_id: Annotated[str | None, typer.Option(help="Hub repo of the adapter.", **_LATER)] = None,
    base: Base = None,
    dtype: Dtype = "auto",
    base_as: BaseKind = None,
    as_json: Json = False,
) -> None:
    """Make the model card of an adapter folder: what it is, how to load it, what it changes."""
    if force and not write:
        raise typer.BadParameter("--force says what --write may replace; pass --write too.")
    metrics = dict(_metric(one) for one in metric or ())
    file = adapter / "README.md"
    edited = file.is_file() and GENERATED not in file.read_text(encoding="utf-8")
    if write and edited and not force:
        raise ValueError(
            f"'{file}' has no mark of this package, so somebody may have edited it. Pass --force to replace it."
        )
    model = AdapterOnBase(adapter, base, dtype, base_as=base_as).load()
    made = adapter_card(
        model, method=method, paper=paper, metrics=metrics or None, evaluated_on=evaluated_on, training_data=data,
        notes=notes, license=license, repo_id=repo_id,
    )  # fmt: skip
    if write:
        write_card(made, adapter)
        print_json({"path": file}) if as_json else print(f"card in {file}")
    elif as_json:
        print_json({"metadata": made.data.to_dict(), "text": made.text})
    else:
        print(made.content)


def _metric(word: str) -> tuple[str, float]:
    name, _, value = word.rpartition("=")
    try:
        return name.strip() or _refuse(word), float(value)
    except ValueError:
        return _refuse(word)


def _refuse(word: str):
    raise typer.BadParameter(f"--metric {word!r} is no NAME=VALUE, as in accuracy=0.91.")
