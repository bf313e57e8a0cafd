"""Arguments and options that several verbs have, described once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from transformers import BitsAndBytesConfig

from ..hub import load_adapter
from ..hub.base_model import BaseAs
from ..utils.plain_data import plain_data

_BASE = "Base model"

Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter folder.", show_default=False)]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]
Base = Annotated[
    str | None,
    typer.Option(
        help="Base model, a Hub id or a folder; without it, what the adapter's config names.",
        show_default=False,
        rich_help_panel=_BASE,
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Dtype to load the base in, e.g. bfloat16; auto: its own.", rich_help_panel=_BASE)
]
Nf4 = Annotated[
    bool,
    typer.Option("--nf4", help="Quantise the base to NF4 first, as QLoRA training did.", rich_help_panel=_BASE),
]
DoubleQuant = Annotated[
    bool,
    typer.Option("--double-quant", help="With --nf4: quantise the block scales as well.", rich_help_panel=_BASE),
]
BaseKind = Annotated[
    BaseAs | None,
    typer.Option(
        "--base-as",
        help="trained: quantised as the adapter was trained on it; full: in full precision. Without it trained, for "
        "patches full.",
        show_default=False,
        rich_help_panel=_BASE,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")]
Picture = Annotated[Path | None, typer.Option(help="File to draw a heat map to: PNG, PDF or SVG.", show_default=False)]


def load(
    adapter: Path, base: str | None, dtype: str, nf4: bool, double_quant: bool, base_as: BaseAs | None = None
) -> PeftModel:
    """The adapter on its base, as the options of the base say.

    Raises:
        ValueError: a dtype that no model is loaded in, or what `load_adapter` refuses.
    """
    if double_quant and not nf4:
        raise typer.BadParameter("--double-quant says how --nf4 quantises; pass --nf4 too.")
    if nf4 and base_as == "full":
        raise typer.BadParameter("--nf4 and --base-as full contradict each other; leave one out.")
    arguments: dict[str, Any] = {"dtype": dtype if dtype == "auto" else _dtype(dtype)}
    if nf4:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
        )
    return load_adapter(adapter, base=base, base_as=base_as or "trained", **arguments)


def print_json(content: Any) -> None:
    """Print dataclasses, paths, tensors and mappings of them as JSON."""
    print(json.dumps(plain_data(content), indent=2))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"--dtype {name} is no dtype to load a model in; give auto, float32, bfloat16 or float16.")
    return dtype
