"""`recipes/benchmarks/pruning.py` in small form: the order that is known of the demo base, and that repair helps."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import pruning


@pytest.mark.slow
def test_sparsegpt_costs_least_random_pruning_most_and_repair_helps(tmp_path, capsys):
    sizes = ["--calibration_rows", "16", "--test_rows", "16", "--seeds", "0", "--perp_steps", "20"]
    found = {row["method"]: row for row in pruning.main(["--output", str(tmp_path), *sizes])}
    for setting in pruning.SETTINGS:
        losses = {method: row[setting][0] for method, row in found.items()}
        assert losses["dense"] <= losses["SparseGPT"] * 1.01
        assert losses["SparseGPT"] < min(losses["Wanda"], losses["magnitude"])
        assert all(losses[f"{name} + PERP"] < losses[name] for name in pruning.REPAIRED)
        assert all(losses[f"{name} + EoRA"] < losses[name] for name in ("magnitude", "Wanda"))
        assert losses["random"] > 2 * max(losses["Wanda"], losses["magnitude"])
    assert (tmp_path / "pruning.png").exists()
    assert "SparseGPT" in capsys.readouterr().out
