"""What pruning costs a base: perplexity of the demo base at 50 %, 2:4 and 70 %, one-shot methods beside one another.

    python recipes/benchmarks/pruning.py                                    # minutes on one core, offline
    python recipes/benchmarks/pruning.py --model meta-llama/Llama-3.2-1B --text train.txt --test test.txt --length 2048

Calibration sequences are drawn anew for each seed, as many tokens for every method; all rows are of one length. The
table has the mean over the seeds (lowest to highest) of the perplexity on text that was not calibrated on. A table goes
to the terminal, `pruning.json`, `.md` and `.png` to `--output`.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Column, option
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo_data
from datasets import Dataset

from hf_sparse_peft.pruning import NM, prune_model

METHODS = ("random", "magnitude", "wanda", "dsnot", "sparsegpt")
SETTINGS = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": NM(2, 4)}, "70 %": {"sparsity": 0.7}}


@dataclass
class PruningOptions(harness.Options):
    """Options of this benchmark."""

    model: str = option(str(Path(__file__).parents[1] / "demo_base"), "model id or folder")
    text: Path | None = option(None, "text file to calibrate on; by default what the demo base was trained on")
    test: Path | None = option(None, "text file to measure on; by default what the demo base never read")
    length: int = option(128, "tokens of a row")
    calibration_rows: int = option(128, "rows to calibrate on")
    test_rows: int = option(128, "rows to measure on")
    seeds: list[int] = option([0, 1, 2], "seeds of the calibration rows")


def rows_of(path: Path | None, split: str, count: int, seed: int, options: PruningOptions) -> Dataset:
    """`count` rows of `input_ids` of one length."""
    if path is None:
        text = demo_data.pretraining_text(40 * count, seed=seed, split=split)
    else:
        text = Dataset.from_dict({"text": path.read_text(encoding="utf-8").split("\n\n")}).shuffle(seed=seed)
    chunks = demo_data.chunk_text(text, AutoTokenizer.from_pretrained(options.model), options.length)
    if len(chunks) < count:
        raise SystemExit(
            f"The {split} text has {len(chunks)} rows of {options.length} tokens, and {count} are asked for."
        )
    return chunks.select(range(count)).select_columns(["input_ids"]).with_format("torch")


@torch.no_grad()
def perplexity(model: nn.Module, rows: Dataset) -> float:
    """exp of the mean loss of a token."""
    model.eval()
    losses = [model(**batch, labels=batch["input_ids"]).loss.item() for batch in DataLoader(rows, batch_size=16)]
    return math.exp(statistics.mean(losses))


def columns() -> list[Column]:
    """Of the table."""

    def cell(name: str) -> Column:
        def shown(row: dict) -> str:
            values = row[name]
            return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

        return Column(name, shown)

    return [Column("method", "method"), *(cell(name) for name in SETTINGS)]


def main(argv: list[str] | None = None) -> list[dict]:
    """Prune, measure, print, draw and write; returns a row a method."""
    options = harness.parse(PruningOptions, __doc__, argv)
    test = rows_of(options.test, "heldout", options.test_rows, 0, options)
    setting = {name: getattr(options, name) for name in ("model", "length", "calibration_rows", "test_rows", "seeds")}
    rows = harness.Rows(options, "pruning", {**setting, "model": Path(options.model).name})

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device)

    def measure(method: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for seed in options.seeds:
            calibration = rows_of(options.text, "train", options.calibration_rows, seed, options)
            for name, how in SETTINGS.items():
                model = load()
                prune_model(
                    model, DataLoader(calibration, batch_size=16), method=method, seed=seed, show_progress=False, **how
                )
                found[name].append(perplexity(model, test))
        return found

    dense = perplexity(load(), test)
    found = [{"method": "dense", **{name: [dense] for name in SETTINGS}}]
    found += [rows.measure(lambda method=method: measure(method), method=method) for method in METHODS]
    title = f"perplexity of {Path(options.model).name}, {options.calibration_rows} x {options.length} tokens calibrated"
    harness.print_table(title, columns(), found)
    (rows.folder / "pruning.md").write_text(harness.markdown(columns(), found))
    bars = {row["method"]: [row[name] for name in SETTINGS] for row in found if row["method"] != "random"}
    harness.draw(rows.folder / "pruning.png", title, {f"dense: {dense:.2f}": bars}, list(SETTINGS))
    return found


if __name__ == "__main__":
    main()
