"""`recipes/essential_sparsity.py` in short form, on the demo base."""

import json
from pathlib import Path

import processes

SCRIPT = Path(__file__).parents[2] / "recipes" / "essential_sparsity.py"


def test_recipe_finds_the_drop_point_of_the_demo_base_in_4_bits(tmp_path):
    sizes = ["--rows", "8", "--steps", "4", "--scopes", "global", "random", "--output_dir", str(tmp_path)]
    done = processes.python(SCRIPT, *sizes, "--load_in_4bit", check=True)
    found = {scope: json.loads((tmp_path / f"{scope}.json").read_text()) for scope in ("global", "random")}
    assert found["global"]["sparsities"] == [0.0, 0.25, 0.5, 0.75]
    assert found["global"]["drop_point"] >= 0.25 > found["random"]["drop_point"]
    assert found["global"]["relative"][-1] < 0.95
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "drop point" in done.stdout
