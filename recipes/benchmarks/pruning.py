"""What pruning costs a base, and what mends it: perplexity of the demo base at 50 %, 2:4 and 70 %.

    python recipes/benchmarks/pruning.py                                    # minutes on one core, offline
    python recipes/benchmarks/pruning.py --model meta-llama/Llama-3.2-1B --text train.txt --test test.txt --length 2048

Calibration sequences are drawn anew for each seed, as many tokens for every method; all rows are of one length. DSnoT
refines the mask; EoRA is a LoRA in closed form beside the pruned base, calibrated on the same rows; PERP trains a
masked LoRA, biases and norms for some steps on further rows of the same text, and is merged before it is measured. The
table has the mean over the seeds (lowest to highest) of the perplexity on text that was not calibrated on. It goes to
the terminal, `pruning.json`, `.md` and `.png` to `--output`.
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
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).parents[1]))

import demo_data
from datasets import Dataset

from hf_sparse_peft import methods
from hf_sparse_peft.pruning import NM, DSnoT, MagnitudePruning, compensate, prune_model

METHODS = {
    "random": "random",
    "magnitude": "magnitude",
    "magnitude + DSnoT": DSnoT(MagnitudePruning()),
    "Wanda": "wanda",
    "Wanda + DSnoT": DSnoT(),
    "Wanda + DSnoT, same sign": DSnoT(same_sign=True),
    "SparseGPT": "sparsegpt",
}
REPAIRED = ("magnitude", "Wanda", "SparseGPT")
REPAIRS = ("EoRA", "PERP")
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
    rank: int = option(16, "of EoRA's and PERP's factors")
    perp_steps: int = option(100, "updates of PERP, of 16 rows")
    perp_rate: float = option(1e-3, "PERP's highest learning rate")


def rows_of(path: Path | None, split: str, count: int, seed: int, options: PruningOptions) -> Dataset:
    """`count` rows of `input_ids` of one length."""
    if path is None:
        text = demo_data.pretraining_text(3 * count, seed=seed, split=split)  # about half a row each
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


def eora(model: nn.Module, calibration: Dataset, options: PruningOptions) -> nn.Module:
    """The model with a LoRA that makes up for what was pruned."""
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    batches = DataLoader(calibration, batch_size=16)
    return compensate(model, dense, batches, rank=options.rank, show_progress=False).model


def perp(model: nn.Module, seed: int, options: PruningOptions) -> nn.Module:
    """The model after a masked LoRA, biases and norms were trained and merged."""
    sparsity = sparsity_of(model)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, methods.get("perp", r=options.rank, lora_alpha=2 * options.rank).config)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.perp_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, options.perp_steps // 10, options.perp_steps)
    rows = rows_of(options.text, "train", 16 * options.perp_steps, seed + 100, options)
    adapted.train()
    for batch in DataLoader(rows, batch_size=16):
        batch = {name: value.to(options.device) for name, value in batch.items()}
        adapted(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    merged = adapted.merge_and_unload()
    if sparsity_of(merged) < sparsity:
        raise SystemExit("A zero was filled by merging.")
    return merged


def sparsity_of(model: nn.Module) -> float:
    """Fraction of zeros of the linear layers, the head aside."""
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


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
    setting = {
        name: getattr(options, name)
        for name in ("length", "calibration_rows", "test_rows", "seeds", "rank", "perp_steps", "perp_rate")
    }
    rows = harness.Rows(options, "pruning", {**setting, "model": Path(options.model).name})

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device)

    def measure(method: str, repair: str = "") -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for seed in options.seeds:
            calibration = rows_of(options.text, "train", options.calibration_rows, seed, options)
            for name, how in SETTINGS.items():
                model = load()
                batches = DataLoader(calibration, batch_size=16)
                prune_model(model, batches, method=METHODS[method], seed=seed, show_progress=False, **how)
                if repair:
                    model = eora(model, calibration, options) if repair == "EoRA" else perp(model, seed, options)
                found[name].append(perplexity(model, test))
        return found

    dense = perplexity(load(), test)
    found = [{"method": "dense", **{name: [dense] for name in SETTINGS}}]
    for method in METHODS:
        found.append(rows.measure(lambda method=method: measure(method), method=method))
        for repair in REPAIRS if method in REPAIRED else ():
            how = {"method": f"{method} + {repair}"}
            found.append(rows.measure(lambda method=method, repair=repair: measure(method, repair), **how))
    title = f"perplexity of {Path(options.model).name}, {options.calibration_rows} x {options.length} tokens calibrated"
    harness.print_table(title, columns(), found)
    (rows.folder / "pruning.md").write_text(harness.markdown(columns(), found))
    bars = {row["method"]: [row[name] for name in SETTINGS] for row in found if row["method"] != "random"}
    harness.draw(rows.folder / "pruning.png", title, {f"dense: {dense:.2f}": bars}, list(SETTINGS))
    return found


if __name__ == "__main__":
    main()
