"""Arguments and options that several verbs have, described once."""

from __future__ import annotations

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class AdapterOnBase:
    """An adapter, and how to get the base that it is for. As a parameter of a verb it stands for one of each field."""

    adapter: Adapter
    base: Base = None
    dtype: Dtype = "auto"
    nf4: Nf4 = False
    double_quant: DoubleQuant = False
    base_as: BaseKind = None

    def load(self, base_as: BaseAs = "trained") -> PeftModel:
        """The adapter on its base; `base_as` is what to do without `--base-as`.

        Raises:
            ValueError: a dtype that no model is loaded in, or what `load_adapter` refuses.
        """
        if self.double_quant and not self.nf4:
            raise typer.BadParameter("--double-quant says how --nf4 quantises; pass --nf4 too.")
        if self.nf4 and self.base_as == "full":
            raise typer.BadParameter("--nf4 and --base-as full contradict each other; leave one out.")
        arguments: dict[str, Any] = {"dtype": self.dtype if self.dtype == "auto" else _dtype(self.dtype)}
        if self.nf4:
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=self.double_quant
            )
        return load_adapter(self.adapter, base=self.base, base_as=self.base_as or base_as, **arguments)


def print_json(content: Any) -> None:
    """Print dataclasses, paths, tensors and mappings of them as JSON."""
    print(json.dumps(plain_data(content), indent=2))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"--dtype {name} is no dtype to load a model in; give auto, float32, bfloat16 or float16.")
    return dtype
