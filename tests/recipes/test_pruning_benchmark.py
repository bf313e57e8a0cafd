"""`recipes/benchmarks/pruning.py` in small form: the order that is known of the demo base."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import pruning


@pytest.mark.slow
def test_sparsegpt_costs_less_than_its_neighbours_and_random_pruning_most(tmp_path, capsys):
    sizes = ["--calibration_rows", "16", "--test_rows", "16", "--seeds", "0"]
    found = {row["method"]: row for row in pruning.main(["--output", str(tmp_path), *sizes])}
    for setting in pruning.SETTINGS:
        losses = {method: row[setting][0] for method, row in found.items()}
        assert losses["dense"] <= losses["sparsegpt"] * 1.01
        assert losses["sparsegpt"] < min(losses["wanda"], losses["magnitude"])
        assert losses["random"] > 2 * max(losses["wanda"], losses["magnitude"])
    assert (tmp_path / "pruning.png").exists()
    assert "sparsegpt" in capsys.readouterr().out
