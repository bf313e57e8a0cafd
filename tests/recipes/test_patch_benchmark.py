"""`recipes/benchmarks/patches.py` in tiny form: exact restore, and bytes under what README says."""

import json
from pathlib import Path

import processes

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "patches.py"


def test_a_tiny_table_restores_to_the_bit_and_counts_the_bytes_of_8b(tmp_path):
    tiny = ["--hidden", "64", "--layers", "1", "--rounds", "1", "--granularities", "entry", "row", "--density", "0.05"]
    processes.python(SCRIPT, *tiny, "--output", tmp_path, check=True)
    rows = json.loads((tmp_path / "patches.json").read_text())["rows"]
    assert [row["exact"] for row in rows] == [True, True]
    sizes = {row["granularity"]: row for row in json.loads((tmp_path / "patch_payload.json").read_text())["rows"]}
    assert sizes["entry"]["matrices"] == 8_029_995_008
    assert sizes["entry"]["floor_bytes"] < sizes["entry"]["file_bytes"] < 30e6 < sizes["entry"]["held_bytes"]
    assert sizes["row"]["file_bytes"] < 1.01 * sizes["row"]["floor_bytes"]
