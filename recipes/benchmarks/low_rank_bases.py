"""Low-rank bases: parameters, perplexity and file size of forms that stand in the place of a base's weights.

    python recipes/benchmarks/low_rank_bases.py                             # minutes on one core, offline
    python recipes/benchmarks/low_rank_bases.py --model meta-llama/Llama-3.2-1B --text train.txt --test test.txt

Each form replaces the linear layers of the trunk, without training; where a method has a size, it is that of `--ratios`
of the weights' numbers. `numbers` are those that are stored for the targets, by the targets' own; the file is the
adapter's, beside the dense model's. Then every method, by its name, trains for `--steps` at each of `--rates`, and the
rate with the lowest perplexity on rows that are neither trained nor measured on is taken; what is trained whole (`trp`,
`self-compression`) is factored or packed before it is measured. Tables go to the terminal, `low_rank_bases.json` and
`.md` to `--output`.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from harness import Column, option
from peft import get_peft_model
from peft.tuners.tuners_utils import _get_in_out_features
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

from pruning import perplexity, rows_of

from hf_sparse_peft import FactoredConfig, calibrate
from hf_sparse_peft.tuners.factored import (
    CUR,
    Codebooks,
    DenseSparse,
    EnergyFraction,
    LowRank,
    OutputFeatures,
    ParameterRatio,
    SingularValueThreshold,
    factored_layers,
)


@dataclass
class BaseOptions(harness.Options):
    """Options of this benchmark."""

    model: str = option(str(Path(__file__).parents[1] / "demo_base"), "model id or folder")
    text: Path | None = option(None, "text file to calibrate on; by default what the demo base was trained on")
    test: Path | None = option(None, "text file to measure on; by default what the demo base never read")
    length: int = option(128, "tokens of a row")
    calibration_rows: int = option(64, "rows to calibrate on")
    test_rows: int = option(64, "rows to measure on")
    ratios: list[float] = option([0.75, 0.5], "numbers that are stored, by those of the targets")
    steps: int = option(40, "updates of each method, of 8 rows")
    rates: list[float] = option([3e-4, 1e-3, 3e-3], "learning rates that each method tries")


def forms(ratio: float) -> dict[str, dict]:
    """Options of the configs, by method, at a ratio of numbers."""
    rank, data = ParameterRatio(ratio), {"examples": 64}
    return {
        "SVD": {"form": LowRank(), "rank": rank},
        "SVD, inputs' norms": {"form": LowRank(weighting="diagonal", **data), "rank": rank},
        "SVD, inputs' moments": {"form": LowRank(weighting="full", **data), "rank": rank},
        "LoRD": {"form": OutputFeatures(center=False, **data), "rank": rank},
        "WeLore": {"form": LowRank(), "rank": SingularValueThreshold(reduction=1 - ratio / 2, min_ratio=0.0)},
    }


def sized() -> dict[str, dict]:
    """Options of the configs of forms with a size of their own."""
    return {
        "CURing": {"form": CUR(max_rank=64)},
        "DSFormer": {"form": DenseSparse()},
        "SketchTune": {"form": Codebooks()},
    }


TRAINED = (
    "welore", "lord:center=false", "pela:compression=2", "low-rank-transformer", "trp:every=10", "curing:max_rank=64",
    "dsformer", "losparse:window=2", "sketchtune", "sst:r=32,every=10", "self-compression",
)  # fmt: skip
"""Methods with the options that a run of some dozens of steps, and a base of some hundred columns, ask for."""


def with_labels(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch that is predicted from itself."""
    tokens = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


def trained_columns() -> list[Column]:
    """Of the second table."""
    return [
        Column("method", "method"),
        Column("at the start", lambda row: f"{row['before']:.2f}"),
        Column("trained", lambda row: f"{row['perplexity']:.2f}"),
        Column("rate", lambda row: f"{row['rate']:g}"),
        Column("file, MB", lambda row: f"{row['megabytes']:.2f}"),
    ]


def columns() -> list[Column]:
    """Of the table."""
    return [
        Column("method", "method"),
        Column("ratio", lambda row: "" if row["ratio"] is None else f"{row['ratio']:.2f}"),
        Column("numbers", lambda row: f"{row['numbers']:.3f}"),
        Column("factored", lambda row: f"{row['factored']} of {row['targets']}"),
        Column("perplexity", lambda row: f"{row['perplexity']:.2f}"),
        Column("file, MB", lambda row: f"{row['megabytes']:.2f}"),
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    """Replace, measure, print and write; returns a row a method and ratio."""
    options = harness.parse(BaseOptions, __doc__, argv)
    test = rows_of(options.test, "heldout", options.test_rows, 0, options)
    calibration = rows_of(options.text, "train", options.calibration_rows, 0, options)
    names = ("model", "length", "calibration_rows", "test_rows")
    setting = {name: getattr(options, name) for name in names}
    rows = harness.Rows(options, "low_rank_bases", {**setting, "model": Path(options.model).name})

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(options.device)

    def measure(how: dict) -> dict:
        base = load()
        config = FactoredConfig(target_modules="all-linear", task_type="CAUSAL_LM", **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # targets that stay dense: they are a column
            model = get_peft_model(base, config)
        config, dense = model.peft_config["default"], 0
        for name in config.left_dense:
            cols, out = _get_in_out_features(model.base_model.model.get_submodule(name))
            dense += cols * out
        if config.needs_calibration:
            calibrate(model, DataLoader(calibration, batch_size=16), show_progress=False)
        stored = sum(config.form.stored_numbers(*size) for size in config.sizes.values())
        whole = sum(size[0] * size[1] for size in config.sizes.values())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        return {
            "numbers": (stored + dense) / (whole + dense),
            "factored": len(factored_layers(model)),
            "targets": len(config.sizes) + len(config.left_dense),
            "perplexity": perplexity(model, test),
            "megabytes": (size + 4 * dense) / 1e6,
        }

    def dense() -> dict:
        model = load()
        config = FactoredConfig(target_modules="all-linear", keep_base=True)
        targets = factored_layers(get_peft_model(load(), config))
        size = sum(layer.out_features * layer.in_features for layer in targets)
        count = len(targets)
        return {
            "numbers": 1.0, "factored": 0, "targets": count, "perplexity": perplexity(model, test),
            "megabytes": 4 * size / 1e6,
        }  # fmt: skip

    def train(candidate: str, rate: float, folder: str) -> tuple[float, nn.Module]:
        """Perplexity of the untrained form, and the form after its training."""
        method = harness.build_method(candidate, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # targets that stay dense
            model = get_peft_model(load(), method.config)
        if method.config.needs_calibration:
            calibrate(model, DataLoader(calibration, batch_size=16), show_progress=False)
        before = perplexity(model, test)
        args = harness.training_arguments(options, Path(folder), rate, 0, per_device_train_batch_size=8)
        harness.make_trainer(method, model, args, train_dataset=training, data_collator=with_labels).train()
        if candidate.startswith("trp"):
            whole = FactoredConfig(rank=EnergyFraction(0.85), target_modules="all-linear", task_type="CAUSAL_LM")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(model.merge_and_unload(), whole)
        elif candidate == "self-compression":
            model.base_model.pack_channels()
        return before, model

    def best_of_rates(candidate: str) -> dict:
        tried = []
        for rate in options.rates:
            with tempfile.TemporaryDirectory() as folder:
                before, model = train(candidate, rate, folder)
                dense = sum(
                    model.base_model.model.get_submodule(name).weight.numel()
                    for name in model.peft_config["default"].left_dense
                )
                model.save_pretrained(folder)
                size = (Path(folder) / "adapter_model.safetensors").stat().st_size
            figures = {"before": before, "perplexity": perplexity(model, test), "megabytes": (size + 4 * dense) / 1e6}
            tried.append({**figures, "rate": rate, "chosen by": perplexity(model, chosen_on)})
        return min(tried, key=lambda row: row["chosen by"])

    found = [rows.measure(dense, method="dense", ratio=None)]
    for ratio in options.ratios:
        found += [rows.measure(lambda how=how: measure(how), method=m, ratio=ratio) for m, how in forms(ratio).items()]
    found += [rows.measure(lambda how=how: measure(how), method=m, ratio=None) for m, how in sized().items()]
    title = f"low-rank forms of {Path(options.model).name}, {options.calibration_rows} x {options.length} tokens read"
    harness.print_table(title, columns(), found)
    tables = [harness.markdown(columns(), found)]
    if options.steps:
        setting |= {"steps": options.steps, "rates": options.rates}
        training = rows_of(options.text, "train", 8 * options.steps, 100, options)
        chosen_on = rows_of(options.text, "train", options.test_rows, 200, options)
        rows = harness.Rows(options, "low_rank_bases", {**setting, "model": Path(options.model).name})
        trained = [
            rows.measure(lambda how=how: best_of_rates(how), method=how.partition(":")[0], part="trained")
            for how in TRAINED
        ]
        harness.print_table(f"perplexity, {options.steps} steps", trained_columns(), trained)
        tables.append(harness.markdown(trained_columns(), trained))
        found += trained
    (rows.folder / "low_rank_bases.md").write_text("\n".join(tables))
    return found


if __name__ == "__main__":
    main()
