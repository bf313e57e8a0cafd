"""`sparse-peft estimate` and `sparse-peft doctor`: before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..preflight import doctor, estimate
from ..preflight.settings import read_adapter_config
from ..training.recipe_files import read_overrides, read_yaml
from ..utils.tables import show
from .app import verb
from .options import Json, print_json

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A config.json, its folder, or a Hub id.", show_default=False)
]


@verb("estimate", panel="Before training", aliases={"optimizer": "--optim"})
def estimate_memory(
    model: Model,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="Options of the method or config.", show_default=False),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="A method's name, or lora; see 'sparse-peft methods'.", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="In its place: an adapter_config.json or its folder.", show_default=False)
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits of the base: 4 (NF4), 8 (LLM.int8()), 16, 32.")] = 16,
    seq: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    batch: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 1,
    optim: Annotated[
        str | None,
        typer.Option(help="A Trainer's optim, e.g. adamw_8bit; without it the method's.", show_default=False),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers again in the backward pass.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="Memory to compare with, e.g. 24G.", show_default=False)] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Choose the largest density or rank that fits into --gpu.")
    ] = False,
    processes: Annotated[int, typer.Option(help="Ranks that train together; figures are those of one.")] = 1,
    sharding: Annotated[
        str | None,
        typer.Option(help="How they share: ddp (the default), fsdp2 or zero3.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate the memory that training takes, by part, from a model's config alone."""
    if (method is None) == (config is None):
        raise typer.BadParameter("Give one of --method and --config.")
    if fit and gpu is None:
        raise typer.BadParameter("--fit chooses what fits into a GPU: give --gpu, e.g. --gpu 24G.")
    given: Any = method if config is None else _config(config)
    chosen = {name: read_yaml(value) for name, value in read_overrides(options or []).items()}
    found = estimate(
        model,
        given,
        bits=bits,
        seq=seq,
        batch=batch,
        optimizer=optim,
        gradient_checkpointing=gradient_checkpointing,
        gpu=None if fit else gpu,
        fit=gpu if fit else None,
        processes=processes,
        sharding=sharding,
        **chosen,
    )
    if as_json:
        print_json(found)
        return
    print(f"{found.headline}\n")
    show(found.table())
    if found.traffic:
        print()
        show(found.traffic_table())
    print(f"\n{found.summary}")


@verb("doctor", panel="Before training", aliases={"adapter_config": "CONFIG"})
def examine(
    model: Model,
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="An adapter_config.json, its folder, a YAML, or a method's name.", show_default=False
        ),
    ],
    args: Annotated[
        Path | None, typer.Option(help="YAML file of TrainingArguments.", exists=True, show_default=False)
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Bits of the base: 4, 8, 16, 32; without it by the model's config.", show_default=False),
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Examples of the training data, for runs in epochs.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Find mistakes in the settings of a run before it begins; exits with 1 where there is an error among them."""
    diagnosis = doctor(model, config, args, bits=bits, examples=examples)
    if as_json:
        print_json(diagnosis)
    else:
        print(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(1)


def _config(path: Path) -> Any:
    made, found = read_adapter_config(path)
    if found:
        raise ValueError(" ".join(f"{one.what} {one.mend}" for one in found))
    return made
