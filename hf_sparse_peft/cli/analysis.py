"""`sparse-peft intruders` and `sparse-peft utilized-rank`: what an adapter did to the singular values of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoTokenizer

from ..hub.analysis import IntruderReport, UtilizationReport, intruder_dimensions, utilized_rank
from ..utils.tables import show
from .app import verb
from .options import AdapterOnBase, Json, Picture, print_json


@verb("intruders", panel="Look into adapters")
def intruders(
    source: AdapterOnBase,
    k: Annotated[int, typer.Option("--k", help="Leading singular vectors to look at.")] = 10,
    epsilon: Annotated[float, typer.Option(help="Similarity below which a vector is an intruder.")] = 0.5,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Count the intruder dimensions of an adapter: leading singular vectors that the base does not have."""
    report = intruder_dimensions(source.load(), k=k, epsilon=epsilon)
    _print_report(report, picture, as_json)


@verb("utilized-rank", panel="Look into adapters")
def utilized(
    source: AdapterOnBase,
    text: Annotated[Path, typer.Option(help="File of examples, one a line.", show_default=False)],
    threshold: Annotated[float, typer.Option(help="Variance to hold, in (0, 1].")] = 0.99,
    examples: Annotated[int, typer.Option(help="Examples to read.")] = 128,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """Measure how much of the adapted weights' rank a text uses."""
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    model = source.load()
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    batches = [dict(tokenizer(line, return_tensors="pt", truncation=True, max_length=1024)) for line in lines]
    _print_report(utilized_rank(model, batches, threshold=threshold, examples=examples), picture, as_json)


def _print_report(report: IntruderReport | UtilizationReport, picture: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        show(report.table())
    if picture is not None:
        file = report.draw(picture)
        if not as_json:
            print(f"picture in {file}")
