"""`sparse-peft train`."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Annotated

import typer

from ..finetuning import TextArguments, train_recipe
from ..utils.option_docs import options_of
from ..utils.tables import show, table
from .app import verb
from .options import Json, print_json


def _show_options(wanted: bool) -> None:
    if wanted:
        rows = [
            (one.name, one.accepts, "" if one.default is MISSING else repr(one.default), one.description)
            for one in options_of(TextArguments)
        ]
        show(table(("option", "takes", "default", "what it is"), rows))
        print("\nAnd those of transformers.TrainingArguments: learning_rate, max_steps, output_dir, bf16, seed, ...")
        raise typer.Exit


@verb("train", panel="Train and measure", context_settings={"ignore_unknown_options": True})
def train(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.yaml [key=value ...]",
            help="A YAML file of options, and options over it, as in learning_rate=1e-4 adapter.r=4.",
            show_default=False,
        ),
    ],
    options: Annotated[
        bool, typer.Option("--options", is_eager=True, callback=_show_options, help="List the options of a recipe.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as a YAML file says, measure it before and after, and leave it with its card."""
    done = train_recipe(words)
    if as_json:
        print_json({"figures": done.figures, "adapter": done.folder, "picture": done.picture})
        return
    show(done.table())
    print(f"adapter and card: {done.folder}" + (f"\npicture: {done.picture}" if done.picture else ""))
