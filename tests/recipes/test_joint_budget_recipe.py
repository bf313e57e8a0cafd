"""`recipes/joint_budget.py` in short form: equal numbers at the end, and a picture of where they went."""

import json
from pathlib import Path

import numpy as np
import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
SIZES = ["--steps", "20", "--batch_size", "2", "--seeds", "0", "--rank", "1", "--test_examples", "16"]
TARGET = 13568
"""Sum of m + n over the 28 linears of the demo base."""


@pytest.fixture
def recipe(monkeypatch):
    for folder in (RECIPES / "benchmarks", RECIPES):
        monkeypatch.syspath_prepend(str(folder))
    import joint_budget

    return joint_budget


def test_one_split_ends_with_the_numbers_of_the_fixed_rank(recipe, tmp_path, capsys):
    runs = recipe.main([*SIZES, "--candidates", "joint-once", "rank only", "--output", str(tmp_path)])
    joint, rank = runs
    assert rank["trained"] == rank["final"] == TARGET
    assert joint["trained"] == 4 * TARGET + 2 * 28  # gates
    assert 0.95 * TARGET <= joint["final"] <= TARGET
    assert sum(sum(kinds.values()) for kinds in joint["split"].values()) == joint["final"]
    assert json.loads((tmp_path / "joint_budget.json").read_text())["rows"] == runs
    assert (tmp_path / "joint_budget.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "loss of test answers" in printed
    assert "13,568 (13,568 to 13,568)" in printed


def test_percentages_are_means_over_runs_of_each_run_s_total(recipe):
    splits = [
        {"0.mlp.up": {"rank": 10, "support": 30}, "1.mlp.up": {"rank": 0, "support": 60}},
        {"0.mlp.up": {"rank": 100}, "1.mlp.up": {"support": 100}},
    ]
    layers, modules, rank = recipe.percentages(splits, "rank")
    assert (layers, modules) == (["0", "1"], ["up"])
    np.testing.assert_allclose(rank, [[30.0], [0.0]])
    np.testing.assert_allclose(recipe.percentages(splits, "support")[2], [[15.0], [55.0]])


def test_every_candidate_is_one_that_the_package_takes(recipe):
    from harness import build_method

    numbers = recipe.budget(recipe.JointTask(recipe.JointOptions()), rank=2)
    assert numbers["fraction"] * (4 * numbers["numbers"] + 4 * 28) == pytest.approx(numbers["numbers"])
    for text in recipe.CANDIDATES.values():
        assert build_method(text, numbers, target_modules="all-linear").config.peft_type
    assert recipe.CANDIDATES.keys() == recipe.RATES.keys()
