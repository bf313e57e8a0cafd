"""`sparse-peft eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer

from ..hub.evaluation import check_harness, evaluate_adapter
from ..utils.file_writing import whole_file
from ..utils.plain_data import plain_data
from ..utils.tables import show
from .app import verb
from .options import AdapterOnBase, Json, print_json


def _batch_size(value: Any) -> int | str:
    if str(value).startswith("auto"):
        return str(value)
    if not str(value).isdigit() or int(value) < 1:
        raise typer.BadParameter(f"{value!r} is neither 'auto' nor an integer >= 1.")
    return int(value)


@verb("eval", panel="Train and measure")
def evaluate(
    source: AdapterOnBase,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, separated by commas.", show_default=False)],
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt; without it what the task says.", show_default=False)
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="Examples of each task, or below 1 a fraction.", show_default=False)
    ] = None,
    batch_size: Annotated[Any, typer.Option(parser=_batch_size, metavar="N|auto", help="Examples at once.")] = "1",
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts into the model's chat template.")
    ] = False,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with further task definitions.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write the figures to, JSON.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Measure an adapter on tasks of lm-evaluation-harness (extra: eval)."""
    check_harness()  # before a base is loaded for it
    model = source.load()
    beside = source.adapter / "tokenizer_config.json"
    name = str(source.adapter) if beside.is_file() else model.peft_config["default"].base_model_name_or_path
    found = evaluate_adapter(
        model,
        AutoTokenizer.from_pretrained(name),
        [task.strip() for task in tasks.split(",") if task.strip()],
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        apply_chat_template=chat_template,
        task_folder=None if task_folder is None else str(task_folder),
    )
    print_json(found) if as_json else show(found.table())
    if out is not None:
        with whole_file(out) as file:
            file.write_text(json.dumps(plain_data(found), indent=2) + "\n", encoding="utf-8")
