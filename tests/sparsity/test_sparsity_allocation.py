"""Budgets: sums, fidelity to the papers, refusals."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ties import priority

from hf_sparse_peft.sparsity import (
    Magnitude,
    UnitGrid,
    counts_from_total,
    erdos_renyi_counts,
    erdos_renyi_densities,
    global_counts,
    proportional_counts,
    stream_seed,
    top_units,
    uniform_counts,
)

WORKED = {"a": UnitGrid(8, 8), "b": UnitGrid(8, 32), "c": UnitGrid(32, 8), "d": UnitGrid(64, 64)}

shapes = st.lists(st.tuples(st.integers(4, 60), st.integers(4, 60)), min_size=1, max_size=6)


def grids_of(sizes):
    return {f"layer.{i}": UnitGrid(r, c) for i, (r, c) in enumerate(sizes)}


def test_erdos_renyi_reproduces_the_worked_case():
    densities = erdos_renyi_densities(WORKED, 0.25)
    assert list(densities.values()) == pytest.approx([1.0, 0.82933, 0.82933, 0.16587], abs=5e-6)
    assert erdos_renyi_counts(WORKED, 0.25) == {"a": 64, "b": 212, "c": 212, "d": 680}
    assert 64 + 212 + 212 + 680 == 0.25 * (64 + 256 + 256 + 4096)


@given(shapes, st.floats(0.1, 1.0))
@settings(deadline=None)
def test_erdos_renyi_keeps_the_budget_and_follows_the_formula(sizes, density):
    grids = grids_of(sizes)
    total = sum(r * c for r, c in sizes)
    densities = erdos_renyi_densities(grids, density)
    assert sum(d * g.num_units for d, g in zip(densities.values(), grids.values(), strict=True)) == pytest.approx(
        density * total
    )
    raw = {n: (g.rows + g.cols) / (g.rows * g.cols) for n, g in grids.items()}
    below_one = [n for n in grids if densities[n] < 1.0]
    for name in below_one:
        assert densities[name] / raw[name] == pytest.approx(densities[below_one[0]] / raw[below_one[0]])
    try:
        counts = erdos_renyi_counts(grids, density)
    except ValueError:
        assert min(d * g.num_units for d, g in zip(densities.values(), grids.values(), strict=True)) < 1
        return
    assert sum(counts.values()) in (math.floor(density * total), round(density * total))
    for name, count in counts.items():
        assert abs(count - densities[name] * grids[name].num_units) < 1 + 1e-6
        assert 1 <= count <= grids[name].num_units


def test_erdos_renyi_with_blocks_stays_within_the_budget():
    grids = {"q": UnitGrid(64, 64, "block", 16), "up": UnitGrid(256, 64, "block", 16), "r": UnitGrid(32, 64, "row")}
    for density in (0.2, 0.5, 0.9, 1.0):
        counts = erdos_renyi_counts(grids, density)
        entries = sum(counts[n] * g.unit_numel for n, g in grids.items())
        total = sum(g.rows * g.cols for g in grids.values())
        assert density * total - 256 <= entries <= density * total


@given(shapes, st.floats(0.1, 1.0))
@settings(deadline=None)
def test_uniform_gives_every_layer_its_floor(sizes, density):
    for name, count in uniform_counts(grids_of(sizes), density).items():
        units = grids_of(sizes)[name].num_units
        assert density * units - 1 < count <= density * units * (1 + 1e-11)


@given(shapes, st.data())
@settings(deadline=None)
def test_spiel_total_is_split_by_the_papers_formula(sizes, data):
    grids = grids_of(sizes)
    total = sum(r * c for r, c in sizes)
    budget = data.draw(st.integers(total // 2 + 1, total))
    counts = counts_from_total(grids, budget)
    assert [*counts.values()] == [budget * r * c // total for r, c in sizes]
    assert budget - len(sizes) < sum(counts.values()) <= budget


def test_totals_are_counted_in_whole_units():
    assert counts_from_total({"m": UnitGrid(64, 64, "block", 16), "r": UnitGrid(64, 64, "row")}, 4096) == {
        "m": 8,
        "r": 32,
    }


@given(shapes, st.integers(0, 2**32), st.data())
@settings(max_examples=30, deadline=None)
def test_global_counts_are_those_of_one_sort_over_all_layers(sizes, seed, data):
    grids = grids_of(sizes)
    generator = torch.Generator().manual_seed(seed)
    # rounded, so that the threshold falls into a tie that crosses layers
    weights = {n: torch.randn(g.rows, g.cols, generator=generator).mul_(2).round_() for n, g in grids.items()}
    total = data.draw(st.integers(1, sum(g.num_units for g in grids.values())))
    everything = [
        (-abs(value), -priority(stream_seed(seed, n), unit), order, unit)
        for order, (n, w) in enumerate(weights.items())
        for unit, value in enumerate(w.reshape(-1).tolist())
    ]
    chosen = sorted(everything)[:total]
    expected = {n: sum(order == i for *_, order, _ in chosen) for i, n in enumerate(grids)}
    score_fns = {n: Magnitude()(weights[n], g) for n, g in grids.items()}
    if 0 in expected.values():
        empty = next(n for n, count in expected.items() if count == 0)
        with pytest.raises(ValueError, match=f"'{empty}'.*Raise density, use uniform"):
            global_counts(score_fns, grids, total, seed)
        return
    counts = global_counts(score_fns, grids, total, seed)
    assert counts == expected
    assert sum(counts.values()) == total
    for order, name in enumerate(grids):
        units = sorted(unit for *_, o, unit in chosen if o == order)
        assert top_units(score_fns[name], counts[name], seed=stream_seed(seed, name)).tolist() == units


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_counts({"tiny": UnitGrid(2, 2)}, 0.1), "no entry in 'tiny'"),
        (lambda: uniform_counts({"m": UnitGrid(2, 2)}, 1.5), r"density=1\.5"),
        (lambda: uniform_counts({}, 0.5), "no modules"),
        (lambda: erdos_renyi_counts({}, 0.5), "no modules"),
        (lambda: erdos_renyi_counts(WORKED, 0.0), r"density=0\.0"),
        (
            lambda: erdos_renyi_counts({"big": UnitGrid(512, 512), "row": UnitGrid(4, 512, "row")}, 0.001),
            "gives 'row'.*no row",
        ),
        (lambda: counts_from_total(WORKED, 4673), "4672 entries"),
        (lambda: counts_from_total(WORKED, 0), "budget of 0 entries"),
        (lambda: counts_from_total(WORKED, 50), "no entry in 'a' .*at least 73"),
        (lambda: global_counts({"a": [torch.ones(64)]}, WORKED, 5), "only one of them has: b, c, d"),
        (lambda: global_counts({"m": [torch.ones(4)]}, {"m": UnitGrid(2, 2)}, 5), "total_units=5"),
        (lambda: global_counts({"m": [torch.ones(5)]}, {"m": UnitGrid(2, 2)}, 2), "'m' has 4 units.*number 5"),
        (
            lambda: global_counts({"m": [torch.full((4,), float("nan"))]}, {"m": UnitGrid(2, 2)}, 2),
            "'m' contain NaN",
        ),
    ],
)
def test_budgets_that_cannot_be_met_name_the_module_and_the_mend(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_advised_total_is_enough():
    assert counts_from_total(WORKED, 73)["a"] == 1


@given(sizes=shapes, data=st.data())
@settings(deadline=None)
def test_a_proportional_budget_is_spent_to_the_last_entry(sizes, data):
    grids = grids_of(sizes)
    total = sum(m * n for m, n in sizes)
    budget = data.draw(st.integers(1, total))
    counts = proportional_counts(grids, budget)
    assert sum(counts.values()) == budget
    for name, count in counts.items():
        assert abs(count - Fraction(budget * grids[name].num_units, total)) < 1


def test_a_proportional_budget_in_blocks_stays_within_it_and_refuses_less_than_one():
    grids = {"a": UnitGrid(8, 8, "block", 4), "b": UnitGrid(16, 8, "block", 4)}
    assert proportional_counts(grids, 5 * 16 + 7) == {"a": 2, "b": 3}
    with pytest.raises(ValueError, match="budget of 15 entries is not between 16"):
        proportional_counts(grids, 15)
