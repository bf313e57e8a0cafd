"""`recipes/benchmarks/step_cost.py` in tiny form: it runs whole, and it counts bytes right."""

from __future__ import annotations

import json
from pathlib import Path

import processes
import pytest

SCRIPTS = Path(__file__).parents[2] / "recipes" / "benchmarks"
SIZES = ["--hidden", "64", "--layers", "1", "--tokens", "16", "--rounds", "2", "--warmup", "1", "--threads", "1"]
MOVED = ("entry", "block32", "row", "column", "hybrid")
OURS = (*MOVED, "subnet", "diagonal")
PEERS = ("frozen", "lora", "lora_lean", "shira", "supertuning", "full", "spiel")
# Shapes of the one layer: hidden 64, two heads of 32 over one key-value head, feed-forward 192.
WEIGHTS = ((64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192))
LORA_NUMBERS = sum(16 * (rows + cols) for rows, cols in WEIGHTS)


@pytest.fixture(scope="module", params=["bf16", pytest.param("nf4", marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("step_cost")
    command = [SCRIPTS / "step_cost.py", *SIZES, "--bases", request.param, "--output", output]
    if request.param == "nf4":
        command.append("--check")
    done = processes.python(*command)
    assert (output / "step_cost.json").exists(), done.stderr
    report = json.loads((output / "step_cost.json").read_text())
    missed = any(not bar["met"] for bar in report["bars"])
    assert done.returncode == int("--check" in command and missed), done.stderr
    return request.param, report, output, done.stdout


def rows_of(run):
    (row,) = run[1]["rows"]
    return row["figures"]


def test_every_method_has_a_row_or_a_reason(run):
    base, report, _, _ = run
    skipped = report["rows"][0]["skipped"]
    assert set(rows_of(run)) | set(skipped) == {*PEERS, *OURS, "entry_grid"}
    assert set(skipped) == {"entry_grid"} | ({"supertuning", "full"} if base == "nf4" else set())


def test_every_row_has_its_figures(run):
    rows = rows_of(run)
    for method, row in rows.items():
        assert row["seconds"] > 0
        assert len(row["seconds_by_round"]) == 2
        assert set(row["over"]) == set(rows)
        assert row["over"][method]["step time"] == row["over"][method]["saved bytes"] == 1
        assert row["peak_bytes"] > row["saved_bytes"] > 0
        assert ("move_seconds" in row) == ("callback_share" in row) == (method in MOVED)
        assert ("file_bytes_bf16" in row) == (method in OURS)


def test_methods_train_equally_many_numbers(run):
    rows = rows_of(run)
    for method in ("lora", "lora_lean", "shira", "spiel", "entry", "hybrid"):
        if method in rows:
            assert rows[method]["trained_numbers"] == LORA_NUMBERS
    assert rows["frozen"]["trained_numbers"] == 0
    for method in {"supertuning", "block32", "row", "column", "subnet"} & set(rows):
        assert rows[method]["trained_numbers"] == pytest.approx(LORA_NUMBERS, rel=0.1)
    assert rows["diagonal"]["trained_numbers"] == pytest.approx(LORA_NUMBERS, rel=0.15)  # few numbers of blocks fit


def test_gradients_and_adam_take_twelve_bytes_a_number(run):
    rows = rows_of(run)
    for method in ("lora", *OURS):
        scalars = rows[method]["gradient_optimizer_bytes"] - 12 * rows[method]["trained_numbers"]
        assert 0 <= scalars <= 4 * 3 * len(WEIGHTS)  # Adam's step counts
    # int16 ages; a byte an entry and one for 255 numbers of the weight, in the one buffer that is saved
    assert rows["entry"]["age_bytes"] == 2 * LORA_NUMBERS
    assert LORA_NUMBERS < rows["entry"]["index_bytes"] < 1.03 * LORA_NUMBERS
    assert rows["column"]["index_bytes"] < 2000


def test_columns_keep_no_more_than_entries_and_nothing_of_ours_has_the_shape_of_a_weight(run):
    rows = rows_of(run)
    # A half of the columns, at this size: three slices would be more than the input that q, k and v share.
    assert rows["column"]["saved_bytes"] <= rows["entry"]["saved_bytes"]
    assert rows["frozen"]["saved_bytes"] < rows["entry"]["saved_bytes"] <= rows["lora"]["saved_bytes"]
    for method in OURS:
        assert rows[method]["saved_tensors_of_weight_shape"] == 0, method
    if "supertuning" in rows:  # the count sees what it is meant to see
        assert rows["supertuning"]["saved_tensors_of_weight_shape"] > 0


def test_bars_table_and_picture_are_there(run):
    base, report, output, printed = run
    assert {"name", "got", "wanted", "met"} == set(report["bars"][0])
    assert any(bar["name"].startswith(f"[{base}] step time: entry") for bar in report["bars"])
    assert all(f"MISSED {bar['name']}:" in printed for bar in report["bars"] if not bar["met"])
    assert "column" in printed
    assert (output / "step_cost.png").stat().st_size > 10_000


def test_a_base_is_measured_once_and_compared_with_another_checkout(run):
    base, report, output, _ = run
    again = [SCRIPTS / "step_cost.py", *SIZES, "--bases", base, "--output", output]
    done = processes.python(*again, "--against", output / "step_cost.json", check=True)
    after = json.loads((output / "step_cost.json").read_text())
    assert after["rows"] == report["rows"]
    compared = [bar for bar in after["bars"] if "now / before" in bar["name"]]
    assert len(after["bars"]) == len(report["bars"]) + len(compared)
    assert f"[{base}] step time, now / before: entry" in {bar["name"] for bar in compared}
    assert all(bar["met"] and bar["got"] == 1 for bar in compared), done.stdout


def test_another_setting_is_not_compared(run, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from step_cost_bars import compare

    base, report, _, _ = run
    (row,) = report["rows"]
    other = {**row, "setting": {**row["setting"], "rounds": 3}}
    with pytest.raises(ValueError, match="in this setting on this machine"):
        compare(base, row, [other])
    slower = json.loads(json.dumps(row))
    slower["figures"]["entry"]["over"]["lora"]["step time"] *= 1.1
    slower["setting"]["code"] = "another checkout's"
    missed = [bar["name"] for bar in compare(base, slower, [row]) if not bar["met"]]
    assert missed == [f"[{base}] step time, now / before: entry"]


def test_any_method_is_a_candidate(tmp_path):
    named = ["--candidates", "lora", "adalora:r=16,target_r=8", "mezo", "--bases", "bf16", "--output", tmp_path]
    processes.python(SCRIPTS / "step_cost.py", *SIZES, *named, check=True)
    (row,) = json.loads((tmp_path / "step_cost.json").read_text())["rows"]
    # r (rows + cols) numbers and a gate a component
    assert row["figures"]["adalora:r=16,target_r=8"]["trained_numbers"] == LORA_NUMBERS + 16 * len(WEIGHTS)
    assert row["skipped"] == {"mezo": "NotImplementedError: its step is that of ZerothOrderTrainer"}
