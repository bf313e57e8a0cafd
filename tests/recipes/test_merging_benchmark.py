"""`recipes/benchmarks/merging.py` in small form: every method gives a row, and memory is measured in a process."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "benchmarks" / "merging.py"


@pytest.fixture
def merging(monkeypatch):
    """The script, by another name than that of the tests of `hf_sparse_peft.merging`."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("merging_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_method_is_measured_and_nothing_twice(merging, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(SCRIPT.parents[2])
    monkeypatch.setattr(merging, "CANDIDATES", {name: found[:1] for name, found in merging.CANDIDATES.items()})
    monkeypatch.setattr(merging, "MEMORY", {"ties, factors": merging.MEMORY["ties, factors"]})
    sizes = ["--steps", "1", "--train_rows", "32", "--validation_rows", "2", "--test_rows", "2", "--seeds", "0"]
    words = ["--output", str(tmp_path), "--families", "factors", "--width", "64", "--layers", "1", *sizes]
    rows = merging.main(words)
    found = {row["method"]: row for row in rows if "method" in row}
    assert {"base", "adapter of digits", *merging.CANDIDATES} <= set(found)
    assert all(row[task] for row in found.values() for task in merging.recipe.TASKS)
    assert [row["merge"] for row in rows if "peak_bytes" in row] == ["ties, factors"]
    assert found["sum"]["svd_error"] == [0.0]
    assert found["ties"]["svd_error"][0] > 0
    table = (tmp_path / "merging.md").read_text()
    assert "memory of a merge of three adapters" in table
    assert (tmp_path / "merging.png").exists()
    capsys.readouterr()
    monkeypatch.setattr(merging, "measure", lambda *_: pytest.fail("measured again"))
    merging.main(words)
