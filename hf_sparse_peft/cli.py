"""`sparse-peft`: look into an adapter folder, and take adapters to other formats."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig

from . import __version__
from .hub import check_adapter, export_lora, export_patch, export_shira, merge_to_dense
from .hub.analysis import IntruderReport, UtilizationReport, intruder_dimensions, utilized_rank
from .hub.base_model import load_base
from .methods import markdown_table

_UPSTREAM = ("LORA", "ADALORA")
"""Types of upstream's that are exported as well."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 1 after an error that the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"sparse-peft {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparse-peft", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    inspect = commands.add_parser("inspect", help="check every tensor of an adapter folder and show what it holds")
    inspect.add_argument("path", type=Path, help="adapter folder")
    inspect.set_defaults(run=_inspect)

    export = commands.add_parser("export", help="write an adapter in a format that loads without this package")
    _add_sources(export)
    export.add_argument("--to", required=True, choices=("lora", "shira", "dense", "patch"), help="what to write")
    export.add_argument("--rank", type=int, help="lora: cut updates without exact low-rank form to this rank by SVD")
    export.add_argument(
        "--uniform-rank",
        type=int,
        nargs="?",
        const=True,
        default=False,
        metavar="RANK",
        help="lora: pad every module with zeros to one rank: RANK, or without it the largest of a module",
    )
    export.add_argument(
        "--only",
        choices=("low_rank", "support", "modules"),
        help="lora, shira, patch: one half of the adapter; patch: heads and biases alone",
    )
    export.add_argument("--format", choices=("vllm", "slime"), help="patch: for which engine (default: vllm)")
    export.add_argument("--encoding", choices=("overwrite", "xor"), help="slime: how bytes change (default: overwrite)")
    export.add_argument("--keep-unchanged", action="store_true", help="patch: keep entries that rounding leaves alone")
    export.set_defaults(run=_export)

    merge = commands.add_parser("merge", help="merge an adapter into a dense model: export --to dense")
    _add_sources(merge)
    left_out = {"rank": None, "uniform_rank": False, "only": None}
    merge.set_defaults(run=_export, to="dense", format=None, encoding=None, keep_unchanged=False, **left_out)

    intruders = commands.add_parser("intruders", help="count the intruder dimensions of an adapter")
    _add_base(intruders)
    intruders.add_argument("--k", type=int, default=10, help="leading singular vectors to look at (default: 10)")
    intruders.add_argument("--epsilon", type=float, default=0.5, help="similarity of an intruder (default: 0.5)")
    intruders.add_argument("--picture", type=Path, help="file to draw the counts to: PNG, PDF or SVG")
    intruders.set_defaults(run=_intruders)

    utilized = commands.add_parser("utilized-rank", help="measure how much of the adapted weights' rank a text uses")
    _add_base(utilized)
    utilized.add_argument("--text", required=True, type=Path, help="file of examples, one a line")
    utilized.add_argument("--threshold", type=float, default=0.99, help="variance to hold, in (0, 1] (default: 0.99)")
    utilized.add_argument("--examples", type=int, default=128, help="examples to read (default: 128)")
    utilized.add_argument("--picture", type=Path, help="file to draw the ranks to: PNG, PDF or SVG")
    utilized.set_defaults(run=_utilized_rank)

    table = commands.add_parser("methods", help="print the methods by name, with what moves, source and cost")
    table.set_defaults(run=lambda options: print(markdown_table()))
    return parser


def _add_sources(command: argparse.ArgumentParser) -> None:
    _add_base(command)
    command.add_argument("out", type=Path, help="folder to write")


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", type=Path, help="adapter folder")
    command.add_argument("--base", help="base model, a Hub id or a folder; default: what the adapter's config names")
    command.add_argument("--dtype", default="auto", help="dtype to load the base in, e.g. bfloat16 (default: its own)")
    command.add_argument("--nf4", action="store_true", help="quantise the base to NF4 first, as QLoRA training did")
    command.add_argument("--double-quant", action="store_true", help="with --nf4: quantise the block scales as well")


def _inspect(options: argparse.Namespace) -> None:
    report = check_adapter(options.path)
    print(report.table())
    print(f"\n{report.parameters:,} living parameters; {report.other_bytes:,} bytes beside the adapted modules.")


def _export(options: argparse.Namespace) -> None:
    if options.to != "lora" and (options.rank or options.uniform_rank):
        raise ValueError(f"--rank and --uniform-rank belong to --to lora, got --to {options.to}.")
    if options.to == "dense" and options.only:
        raise ValueError("--only belongs to --to lora, shira and patch; a dense model has both halves.")
    _check_patch_options(options)
    if json.loads((options.path / "adapter_config.json").read_text(encoding="utf-8")).get("peft_type") not in _UPSTREAM:
        check_adapter(options.path)
    model = _load(options)
    if options.to == "lora":
        done = export_lora(model, options.out, uniform_rank=options.uniform_rank, rank=options.rank, only=options.only)
        for name, rank in done.ranks.items():
            print(f"{name}  rank {rank}  relative error {done.errors[name]:.3g}")
        print(f"{len(done.ranks)} modules, {done.file_bytes:,} bytes in {options.out}")
    elif options.to == "shira":
        print(f"SHiRA with r={export_shira(model, options.out, only=options.only)} in {options.out}")
    elif options.to == "patch":
        slime = {"encoding": options.encoding} if options.encoding else {}
        done = export_patch(
            model,
            options.out,
            options.format or "vllm",
            only=options.only,
            keep_unchanged=options.keep_unchanged,
            **slime,
        )
        patch = done.patch
        print(
            f"{patch.entries:,} values of {len(patch.weights)} tensors, {patch.unchanged:,} left out that rounding "
            f"leaves as they are, {done.file_bytes:,} bytes in {done.path}"
        )
    else:
        dense = merge_to_dense(model, options.out)
        print(f"{sum(p.numel() for p in dense.parameters()):,} parameters in {options.out}")


def _check_patch_options(options: argparse.Namespace) -> None:
    given = [name for name in ("format", "encoding", "keep_unchanged") if getattr(options, name)]
    if given and options.to != "patch":
        raise ValueError(f"--{given[0].replace('_', '-')} belongs to --to patch, got --to {options.to}.")
    if options.encoding and options.format != "slime":
        raise ValueError("--encoding belongs to --format slime.")
    halves = {"patch": ("support", "modules"), "lora": ("low_rank", "support"), "shira": ("support",)}
    if options.only and options.only not in halves[options.to]:
        raise ValueError(f"--only {options.only}: --to {options.to} takes {' or '.join(halves[options.to])}.")
    if options.to == "patch" and options.nf4:
        raise ValueError("A patch holds values of the dense checkpoint; leave --nf4 out, the adapter is the same.")


def _intruders(options: argparse.Namespace) -> None:
    report = intruder_dimensions(_load(options), k=options.k, epsilon=options.epsilon)
    _print_report(report, options.picture)


def _utilized_rank(options: argparse.Namespace) -> None:
    lines = [line for line in options.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    model = _load(options)
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    batches = [dict(tokenizer(line, return_tensors="pt", truncation=True, max_length=1024)) for line in lines]
    report = utilized_rank(model, batches, threshold=options.threshold, examples=options.examples)
    _print_report(report, options.picture)


def _print_report(report: IntruderReport | UtilizationReport, picture: Path | None) -> None:
    print(report.table())
    if picture is not None:
        print(f"picture in {report.draw(picture)}")


def _load(options: argparse.Namespace) -> nn.Module:
    config = json.loads((options.path / "adapter_config.json").read_text(encoding="utf-8"))
    base = options.base or config.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"'{options.path}' does not name its base model; pass --base.")
    if options.double_quant and not options.nf4:
        raise ValueError("--double-quant says how --nf4 quantises; pass --nf4 too.")
    arguments = {"dtype": options.dtype if options.dtype == "auto" else _dtype(options.dtype)}
    if options.nf4:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=options.double_quant,
        )
    if not options.base and config.get("revision"):
        arguments["revision"] = config["revision"]  # of the base, as peft's own AutoPeftModel takes it
    trained = load_base(base, config, options.path, **arguments)
    try:
        model = PeftModel.from_pretrained(trained, str(options.path)).eval()
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise ValueError(f"'{options.path}' does not fit '{base}': {error}") from error
    model.peft_config["default"].base_model_name_or_path = base  # what was loaded, for the config of an export
    return model


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"--dtype {name} is no dtype to load a model in; give auto, float32, bfloat16 or float16.")
    return dtype


if __name__ == "__main__":
    sys.exit(main())
