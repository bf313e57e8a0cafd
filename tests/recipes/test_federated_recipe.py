"""`recipes/federated.py` in short form: every algorithm's rounds, with clients in this process and in two others."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ("rounds=2", "local_steps=1", "clients=3", "fraction=0.7", "train_examples=30", "test_examples=2",
         "batch_size=2", "feddip.reconfigure_every=1", "feddip.segments=2", "ferret.bases=4")  # fmt: skip


@pytest.fixture
def main(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))

    def run(*options):
        recipe = importlib.import_module("federated")
        return recipe.main(["recipes/federated.yaml", *SHORT, *options, f"output_dir={tmp_path}"])

    return run


def test_every_algorithm_runs_its_rounds_and_leaves_an_adapter(main, tmp_path):
    figures = main("processes=0")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert (tmp_path / "federated.png").stat().st_size > 10_000
    up = {}
    for name in ("fedavg", "feddip", "ferret"):
        history = figures[name]["history"]
        assert [row["clients"] for row in history] == [2, 2]
        assert figures[name]["bytes"] == sum(row["bytes_down"] + row["bytes_up"] for row in history)
        up[name] = history[-1]["bytes_up"]
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
    assert up["ferret"] < up["fedavg"] < up["feddip"]


@pytest.mark.slow
def test_workers_give_the_same_figures_and_some_drop_out(main):
    alone, apart = main("processes=0", "drop_out=0.4"), main("processes=2", "drop_out=0.4")
    assert alone == apart
    assert any(row["refused"] for found in alone.values() for row in found["history"])
