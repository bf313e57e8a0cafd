"""`recipes/benchmarks/galore.py` in tiny form: bytes are those of the formulas, losses those of the references."""

import json
from pathlib import Path

import processes

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "galore.py"


def test_bytes_follow_the_formulas_and_losses_the_references(tmp_path):
    sizes = ["--hidden", "64", "--layers", "2", "--rank", "8", "--steps", "4", "--batch_size", "2"]
    processes.python(SCRIPT, *sizes, "--output", tmp_path, check=True)
    rows = json.loads((tmp_path / "galore.json").read_text())["rows"]
    counted = {row["optimizer"]: row for row in rows if row["part"] == "bytes"}
    assert counted["galore"]["layers"] < counted["adamw fp32"]["layers"] / 2
    assert counted["galore"]["layers"] < counted["fira"]["layers"] < counted["galore"]["layers"] + 64
    assert counted["muon"]["layers, a weight"] < 4.1
    compared = {row["against"]: row for row in rows if row["part"] == "loss"}
    for name in ("galore", "fira"):
        assert compared[name]["largest difference"] < 1e-5
        assert compared[name]["ours"] < compared[name]["first"]
