"""`recipes/benchmarks/zeroth_order_memory.py` in tiny form: the peak of a MeZO step is that of an evaluation."""

import json
from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "zeroth_order_memory.py"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("memory")
    sizes = ["--hidden", "64", "--layers", "2", "--tokens", "64", "--bases", "fp32", "bf16", "nf4"]
    processes.python(SCRIPT, *sizes, "--output", output, check=True)
    rows = json.loads((output / "zeroth_order_memory.json").read_text())["rows"]
    return {f"{row['trained']}, {row['base']}": row for row in rows}


def test_every_row_is_there(report):
    wanted = {f"{what}, {base}" for what in ("lora", "support", "full") for base in ("fp32", "bf16", "nf4")}
    assert set(report) == wanted - {"full, nf4"}


def test_a_mezo_step_needs_an_evaluation_and_one_chunk(report):
    for name, row in report.items():
        peaks = row["peak_bytes"]
        slack = 4096  # scalars, a generator
        assert peaks["inference"] <= peaks["mezo"] <= peaks["inference"] + row["chunk_bytes"] + slack, name
        kept = row["largest_module_bytes"] + row["chunk_bytes"]
        assert peaks["mezo-layerwise"] <= peaks["inference"] + kept + slack, name


def test_sparse_mezo_on_whole_weights_adds_a_bit_a_weight(report):
    for name in ("full, fp32", "full, bf16"):
        row = report[name]
        mask = row["trained_numbers"] / 8
        chunks = 3 * row["chunk_bytes"]  # the direction, the mask of its chunk, and what unpacks it
        assert row["peak_bytes"]["sparse-mezo"] <= row["peak_bytes"]["inference"] + mask + chunks + 8192, name


def test_adamw_needs_gradients_moments_and_activations(report):
    for name, row in report.items():
        size = 2 if name == "full, bf16" else 4
        assert row["peak_bytes"]["adamw"] > row["peak_bytes"]["mezo"] + 3 * size * row["trained_numbers"], name
