"""How many of a model's weights can go before it shows: the essential sparsity of a base, with a picture.

Without arguments it runs offline on the demo base beside it, in half a minute on one CPU core:

    python recipes/essential_sparsity.py

On another model and text, in 4 bits:

    python recipes/essential_sparsity.py --load_in_4bit --model_name_or_path meta-llama/Llama-3.2-1B --text_file a.txt

The smallest weights of the trunk's matrices are zeroed in one shot, share after share, and the model is asked for the
next token of text that it was not trained on; nothing is fine-tuned and every weight is back at the end. The drop point
that it prints is what `methods.get("essential-sparsity", sparsity=...)` takes: those weights are free to train.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import _quiet  # noqa: F401
import demo_data
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_sparse_peft.methods import EssentialSparsity, essential_sparsity
from hf_sparse_peft.pruning.reading.one_shot import SCOPES

HERE = Path(__file__).parent


@torch.no_grad()
def next_token_accuracy(model: nn.Module, chunks: Dataset, batch_size: int = 16) -> float:
    """Fraction of tokens that the model puts first, on rows of `input_ids` of one length."""
    model.eval()
    right = total = 0
    for start in range(0, len(chunks), batch_size):
        ids = torch.tensor(chunks[start : start + batch_size]["input_ids"], device=model.device)
        guesses = model(input_ids=ids).logits[:, :-1].argmax(-1)
        right += int((guesses == ids[:, 1:]).sum())
        total += guesses.numel()
    return right / total


def parse(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(HERE / "demo_base"), help="base; the demo's by default")
    parser.add_argument("--text_file", type=Path, help="text to predict; by default what the demo base never read")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 with double quantisation")
    parser.add_argument(
        "--scopes", nargs="+", default=list(SCOPES), choices=SCOPES, help="which weights go; the first is drawn in full"
    )
    parser.add_argument("--rows", type=int, default=64, help="rows of 128 tokens to predict")
    parser.add_argument("--steps", type=int, default=10, help="swept sparsities, from 0 on in steps of 1 / steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random scopes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/essential_sparsity"))
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> tuple[nn.Module, Dataset]:
    """The model, and rows of tokens."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, dtype=torch.bfloat16, quantization_config=quantization if args.load_in_4bit else None
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if args.text_file:
        text = Dataset.from_dict({"text": args.text_file.read_text(encoding="utf-8").split("\n\n")})
    else:
        text = demo_data.pretraining_text(40 * args.rows, seed=0, split="heldout")
    chunks = demo_data.chunk_text(text, tokenizer)
    return model, chunks.select(range(min(args.rows, len(chunks))))


def sweep(
    model: nn.Module, evaluate: Callable[[nn.Module], float], args: argparse.Namespace
) -> list[EssentialSparsity]:
    """One curve a scope."""
    even = [step / args.steps for step in range(args.steps)]
    shares = {scope: None if scope == "n:m" else even for scope in args.scopes}
    return [essential_sparsity(model, evaluate, shares[scope], scope, seed=args.seed) for scope in args.scopes]


def print_table(results: list[EssentialSparsity]) -> None:
    """Drop point, knee and quality along the sweep, one row a scope."""
    table = Table(title="next-token accuracy, % of the whole model's")
    table.add_column("removed")
    table.add_column("drop point", justify="right")
    table.add_column("knee", justify="right")
    shares = sorted({share for found in results for share in found.sparsities})
    for share in shares:
        table.add_column(f"{100 * share:g} %", justify="right")
    for found in results:
        at = dict(zip(found.sparsities, found.relative, strict=True))
        cells = [f"{100 * at[share]:.1f}" if share in at else "" for share in shares]
        knee = "" if found.knee is None else f"{100 * found.knee:g} %"
        table.add_row(found.scope, f"{100 * found.drop_point:g} %", knee, *cells)
    Console(width=140).print(table)


def main(argv: list[str]) -> list[EssentialSparsity]:
    """Sweep, print, draw; returns the curves."""
    args = parse(argv)
    model, chunks = load(args)
    results = sweep(model, lambda pruned: next_token_accuracy(pruned, chunks), args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for found in results:
        found.save(args.output_dir / f"{found.scope.replace(':', '_')}.json")
    results[0].plot(args.output_dir / "report.png", *results[1:])
    print_table(results)
    print(f"picture: {args.output_dir / 'report.png'}")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
