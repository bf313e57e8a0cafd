"""`sparse-peft export` and `sparse-peft merge`: adapters in formats that load without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from peft import PeftModel

from ..hub import (
    check_adapter,
    export_lora,
    export_lora_for_llama_cpp,
    export_patch,
    export_shira,
    merge_to_dense,
    read_config,
)
from ..hub.processors import has_processor
from ..utils.tables import show, table
from .app import verb
from .options import AdapterOnBase, Json, Out, print_json

_UPSTREAM = ("LORA", "ADALORA")
"""Types of upstream's that are exported as well."""
_HALVES = {
    "patch": ("support", "modules"),
    "lora": ("low_rank", "support"),
    "gguf-lora": ("low_rank", "support"),
    "shira": ("support",),
}


def _uniform_rank(value: str) -> int | bool:
    if value == "largest":
        return True
    if not value.isdigit() or value == "0":
        raise typer.BadParameter(f"{value!r} is neither 'largest' nor an integer >= 1.")
    return int(value)


Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|none",
        help="dense: tokenizer to write beside the model; without it the adapter's, else the base's.",
        show_default=False,
    ),
]


@verb("export", panel="Take adapters elsewhere")
def export(
    source: AdapterOnBase,
    out: Out,
    to: Annotated[
        Literal["lora", "dense", "shira", "patch", "gguf-lora"], typer.Option(help="What to write.", show_default=False)
    ],
    rank: Annotated[
        int | None,
        typer.Option(
            help="lora, gguf-lora: cut updates without exact low-rank form to this rank by SVD.", show_default=False
        ),
    ] = None,
    uniform_rank: Annotated[
        Any,
        typer.Option(
            parser=_uniform_rank,
            metavar="RANK|largest",
            help="lora, gguf-lora: pad every module with zeros to one rank, or to the largest of a module.",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        Literal["low_rank", "support", "modules"] | None,
        typer.Option(
            help="lora, gguf-lora, shira, patch: one half of the adapter; patch: heads and biases alone.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        Literal["vllm", "slime"] | None, typer.Option(help="patch: for which engine; vllm without it.")
    ] = None,
    encoding: Annotated[
        Literal["overwrite", "xor"] | None, typer.Option(help="slime: how bytes change; overwrite without it.")
    ] = None,
    keep_unchanged: Annotated[
        bool, typer.Option("--keep-unchanged", help="patch: keep entries that rounding leaves alone.")
    ] = False,
    tokenizer: Tokenizer = None,
    as_json: Json = False,
) -> None:
    """Write an adapter in a format that loads without this package."""
    if to not in ("lora", "gguf-lora") and (rank or uniform_rank):
        raise typer.BadParameter(f"--rank and --uniform-rank belong to --to lora and gguf-lora, got --to {to}.")
    if to == "dense" and only:
        raise typer.BadParameter("--only belongs to --to lora, gguf-lora, shira, patch; a dense model has both halves.")
    given = {"--format": format, "--encoding": encoding, "--keep-unchanged": keep_unchanged}
    if tokenizer and to != "dense":
        raise typer.BadParameter(f"--tokenizer belongs to --to dense, got --to {to}.")
    _check_patch_options(to, only, source.nf4, {flag: value for flag, value in given.items() if value})
    if read_config(source.adapter).get("peft_type") not in _UPSTREAM:
        check_adapter(source.adapter)
    # A patch holds values of the checkpoint as it is stored.
    model = source.load("full" if to == "patch" else "trained")
    if to == "lora":
        _to_lora(model, out, uniform_rank or False, rank, only, as_json)
    elif to == "gguf-lora":
        _to_gguf(model, out, uniform_rank or True, rank, only, as_json)
    elif to == "shira":
        found = export_shira(model, out, only=only)
        print_json({"r": found, "path": out}) if as_json else print(f"SHiRA with r={found} in {out}")
    elif to == "patch":
        slime = {"encoding": encoding} if encoding else {}
        _to_patch(model, out, format or "vllm", as_json, only=only, keep_unchanged=keep_unchanged, **slime)
    else:
        _to_dense(model, source.adapter, out, tokenizer, as_json)


@verb("merge", panel="Take adapters elsewhere")
def merge(
    source: AdapterOnBase,
    out: Out,
    tokenizer: Tokenizer = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into a dense model: `export --to dense`."""
    if read_config(source.adapter).get("peft_type") not in _UPSTREAM:
        check_adapter(source.adapter)
    _to_dense(source.load(), source.adapter, out, tokenizer, as_json)


def _check_patch_options(to: str, only: str | None, nf4: bool, given: dict[str, Any]) -> None:
    if given and to != "patch":
        raise typer.BadParameter(f"{next(iter(given))} belongs to --to patch, got --to {to}.")
    if "--encoding" in given and given.get("--format") != "slime":
        raise typer.BadParameter("--encoding belongs to --format slime.")
    if only and only not in _HALVES[to]:
        raise typer.BadParameter(f"--only {only}: --to {to} takes {' or '.join(_HALVES[to])}.")
    if to == "patch" and nf4:
        raise typer.BadParameter(
            "A patch holds values of the dense checkpoint; leave --nf4 out, the adapter is the same."
        )


def _to_lora(model: PeftModel, out: Path, uniform_rank: int | bool, rank: int | None, only: str | None, as_json: bool):
    done = export_lora(model, out, uniform_rank=uniform_rank, rank=rank, only=only)
    if as_json:
        print_json(done)
        return
    rows = [(name, rank, done.errors[name]) for name, rank in done.ranks.items()]
    show(table(("module", "rank", "relative error"), rows))
    print(f"{len(done.ranks)} modules, {done.file_bytes:,} bytes in {out}")


def _to_gguf(model: PeftModel, out: Path, uniform_rank: int | bool, rank: int | None, only: str | None, as_json: bool):
    done = export_lora_for_llama_cpp(model, out, uniform_rank=uniform_rank, rank=rank, only=only)
    if as_json:
        print_json(done)
        return
    print(
        f"{len(done.lora.ranks)} modules as a LoRA of rank {done.rank}, {done.lora.file_bytes:,} bytes in {out}.\n"
        "This is no GGUF file yet: how an architecture's weights are named and reordered there is known to llama.cpp's "
        f"converter alone. From a checkout of llama.cpp:\n\n    {done.command}\n"
    )


def _to_patch(model: PeftModel, out: Path, kind: str, as_json: bool, **options: Any) -> None:
    done = export_patch(model, out, kind, **options)
    patch = done.patch
    figures = {"entries": patch.entries, "tensors": len(patch.weights), "unchanged": patch.unchanged}
    if as_json:
        print_json({**figures, "file_bytes": done.file_bytes, "path": done.path})
        return
    print(
        f"{patch.entries:,} values of {len(patch.weights)} tensors, {patch.unchanged:,} left out that rounding "
        f"leaves as they are, {done.file_bytes:,} bytes in {done.path}"
    )


def _to_dense(model: PeftModel, adapter: Path, out: Path, tokenizer: str | None, as_json: bool) -> None:
    own = adapter if has_processor(adapter) else "base"  # beside the adapter lies the one that it was trained with
    given = {None: own, "none": None}.get(tokenizer, tokenizer)
    count = sum(p.numel() for p in merge_to_dense(model, out, tokenizer=given).parameters())
    beside = has_processor(out)
    if as_json:
        print_json({"parameters": count, "path": out, "tokenizer": beside})
    else:
        print(f"{count:,} parameters {'and a tokenizer or processor' if beside else 'without a tokenizer'} in {out}")
