"""The table that the engine chooses its ways by: whole, written and read back, and the cheapest is chosen."""

import json

import pytest
import torch

from hf_sparse_peft.ops import Costs, costs, write_costs
from hf_sparse_peft.ops.costs import costs_of, entry_gradient_way, entry_product_way, load_costs

FIGURES = {
    "dense_number": 1.0, "sampled_entry": 20.0, "transposed_line": 5.0, "moved_line": 2.0, "small_number": 3.0,
    "copied_number": 4.0, "copied_entry": 50.0, "sparse_entry": 10.0,
}  # fmt: skip
COSTS = Costs(**FIGURES)


def test_the_packages_table_has_every_dtype_and_says_how_each_row_was_found():
    rows = load_costs()
    assert {(row["device"], row["dtype"]) for row in rows} == {
        (device, dtype) for device in ("cpu", "cuda") for dtype in ("bfloat16", "float16", "float32", "float64")
    }
    for row in rows:
        assert row["how"].startswith(("measured: ", "estimate, "))
        assert all(cost > 0 for cost in row["costs"].values())


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    path.write_text(costs.PATH.read_text())
    monkeypatch.setattr(costs, "PATH", path)
    monkeypatch.setattr(costs.load_costs, "__defaults__", (path,))
    costs._table.cache_clear()
    yield path
    costs._table.cache_clear()


def test_a_written_row_replaces_the_one_of_its_device_and_dtype_at_once(table):
    count = len(load_costs(table))
    assert costs_of("cuda", torch.bfloat16) != COSTS
    write_costs("cuda", torch.bfloat16, COSTS, "measured: a test", table)
    assert costs_of("cuda", torch.bfloat16) == COSTS
    written = json.loads(table.read_text())
    assert len(written) == count
    assert [row["how"] for row in written if row["costs"] == FIGURES] == ["measured: a test"]


def test_a_cost_that_is_no_time_is_refused_and_the_table_stays(table):
    before = table.read_text()
    with pytest.raises(ValueError, match="moved_line=-1"):
        write_costs("cpu", torch.float32, Costs(**{**FIGURES, "moved_line": -1.0}), "measured: a test", table)
    assert table.read_text() == before


def test_other_devices_and_dtypes_take_a_row_that_exists():
    assert costs_of("xpu", torch.bfloat16) == costs_of("cuda", torch.bfloat16)
    assert costs_of("cpu", torch.float8_e4m3fn) == costs_of("cpu", torch.float32)


@pytest.mark.parametrize(
    ("entries", "subgrid", "may_sample", "way"),
    [
        (100, None, True, "sampled"),  # 100 * 20 + 200 * 5 = 3000 < 100 * 100
        (500, None, True, "dense"),  # 500 * 20 + 200 * 5 = 11000
        (100, None, False, "dense"),
        (500, (50, 50), True, "compacted"),  # 50 * 50 + 100 * 2 = 2700
        (80, (50, 50), True, "sampled"),  # 80 * 20 + 1000 = 2600
        (500, (99, 99), True, "dense"),  # 99 * 99 + 198 * 2 > 10000
        (0, None, True, "dense"),
    ],
)
def test_the_gradient_takes_the_smallest_sum(entries, subgrid, may_sample, way):
    assert entry_gradient_way(COSTS, 100, 100, entries, subgrid, may_sample) == way


@pytest.mark.parametrize(
    ("tokens", "entries", "subgrid", "options", "way"),
    [
        (1, 1000, None, {}, "sparse"),  # 1000 * 10 < 100 * 100 * 4 + 1000 * 50
        (100, 1000, None, {}, "copy"),
        (1, 10, (20, 30), {}, "sparse"),
        (8, 1000, (10, 10), {}, "compacted"),  # 8 * (100 + 30 * 2) + 50000 < 8 * 1000 * 10
        (8, 1000, (10, 10), {"copied": False}, "copy"),  # 50000
        (1000, 1000, None, {"may_copy": False}, "sparse"),
        (1000, 1000, (10, 10), {"may_copy": False}, "compacted"),
    ],
)
def test_the_product_takes_the_smallest_sum(tokens, entries, subgrid, options, way):
    assert entry_product_way(COSTS, tokens, 100, 100, entries, subgrid, **options) == way


def test_what_is_added_to_is_moved_twice():
    # rows are added to in the forward product, columns in the input's gradient: 2 * 50 + 1 lines against 50 + 2
    cheap = Costs(**{**FIGURES, "moved_line": 100.0, "dense_number": 1e-6, "sparse_entry": 1.0, "copied_entry": 1e-6})
    size = 10, 100, 100, 8000, (50, 1)
    assert entry_product_way(cheap, *size, may_copy=False) == "sparse"
    assert entry_product_way(cheap, *size, may_copy=False, gradient=True) == "compacted"


def test_without_a_sparse_product_something_is_chosen_still():
    none = Costs(**{**FIGURES, "sparse_entry": None})
    assert entry_product_way(none, 1, 100, 100, 1000, None) == "copy"
    assert entry_product_way(none, 1, 100, 100, 1000, (50, 50), may_copy=False) == "compacted"
    assert entry_product_way(none, 1, 100, 100, 1000, None, may_copy=False) == "sparse"
