"""Supports in patterns: counts, where units lie, what is best of all, and what is refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_peft.sparsity import Everywhere, Grid, Random, UnitGrid, best_subgrid, region_of, select_units, top_units

DATA_FREE = ["random", "magnitude", "smallest_magnitude", "low_rank_magnitude", "decomposition_residual"]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lines(units: torch.Tensor, columns: int) -> tuple[set[int], set[int]]:
    return {u // columns for u in units.tolist()}, {u % columns for u in units.tolist()}


def ceil(fraction: float, side: int) -> int:
    return math.ceil(fraction * side - 1e-9)


@pytest.mark.parametrize("criterion", DATA_FREE)
def test_every_criterion_keeps_to_the_grid_and_has_its_count(criterion):
    weight, grid = torch.randn(30, 44, generator=drawn()), UnitGrid(30, 44)
    units = select_units(criterion, weight, grid, 60, generator=drawn(3), pattern=Grid(0.25, 0.25))
    rows, columns = lines(units, 44)
    assert units.unique().numel() == 60
    assert len(rows) <= 8  # ceil(7.5)
    assert len(columns) <= 11
    free = select_units(criterion, weight, grid, 60, generator=drawn(3))
    assert not torch.equal(units, free)


@pytest.mark.parametrize("criterion", DATA_FREE)
def test_the_whole_weight_as_a_grid_is_the_free_choice_bit_for_bit(criterion):
    weight, grid = torch.randn(30, 44, generator=drawn()), UnitGrid(30, 44)
    of = [select_units(criterion, weight, grid, 60, generator=drawn(3), pattern=p) for p in (Grid(1, 1), None)]
    assert torch.equal(*of)
    assert of[0].dtype == of[1].dtype


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(2, 5), st.floats(0.2, 1), st.floats(0.2, 1), st.integers(0, 999), st.data())
def test_units_are_the_best_inside_of_a_grid_no_worse_than_independent_sums(m, n, p, q, seed, data):
    pattern, grid = Grid(p, q), UnitGrid(m, n)
    r, c = ceil(p, m), ceil(q, n)
    assert pattern.capacity(grid) == r * c
    k = data.draw(st.integers(1, r * c))
    scores = torch.rand(m, n, generator=drawn(seed))
    region = region_of(pattern, scores.reshape(-1), grid)
    rows, columns = lines(region.units, n)
    assert (len(rows), len(columns), region.size) == (r, c, r * c)
    held = float(scores.reshape(-1)[region.units].sum())
    independent = scores[scores.sum(1).topk(r).indices][:, scores.sum(0).topk(c).indices].sum()
    optimum = max(
        float(scores[list(a)][:, list(b)].sum())
        for a in itertools.combinations(range(m), r)
        for b in itertools.combinations(range(n), c)
    )
    assert float(independent) - 1e-5 <= held <= optimum + 1e-5
    units = top_units(region.masked(scores.reshape(-1)), k)
    inside = scores[sorted(rows)][:, sorted(columns)].reshape(-1)
    assert units.numel() == k
    assert torch.allclose(scores.reshape(-1)[units.long()].sort().values, inside.topk(k).values.sort().values)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9))
def test_what_is_kept_is_inside_whatever_the_score(seed, count):
    grid, pattern = UnitGrid(12, 16), Grid(0.25, 0.25)
    kept = region_of(pattern, torch.rand(192, generator=drawn(seed + 1)), grid).random_units(count, drawn(seed))
    for region in (
        region_of(pattern, torch.rand(192, generator=drawn(seed)), grid, kept),
        pattern.random_region(grid, seed, kept),
    ):
        assert bool(region.contains(kept).all())
        assert tuple(map(len, lines(region.units, 16))) == (3, 4)
        others = region.random_units(region.size - count, drawn(seed), kept)
        assert torch.equal(torch.cat([kept, others]).long().sort().values, region.units)


def test_kept_lines_come_first_and_more_than_there_is_room_for_are_refused():
    scores = torch.zeros(4, 4)
    scores[0] = 9.0
    rows, _ = best_subgrid(scores, 2, 2, kept_rows=torch.tensor([3]))
    assert rows.tolist() == [0, 3]
    with pytest.raises(ValueError, match="rows=2 cannot hold the 3"):
        best_subgrid(scores, 2, 2, kept_rows=torch.tensor([1, 2, 3]))


def test_blocks_lie_in_rows_and_columns_of_blocks():
    grid = UnitGrid(32, 64, "block", 4)  # 8 x 16 blocks
    units = select_units("magnitude", torch.randn(32, 64, generator=drawn()), grid, 8, pattern=Grid(0.25, 0.25))
    rows, columns = lines(units, 16)
    assert units.numel() == 8
    assert (len(rows), len(columns)) == (2, 4)


def test_the_answer_does_not_depend_on_how_scores_are_chunked():
    scores, grid = torch.rand(24 * 40, generator=drawn()), UnitGrid(24, 40)
    whole = region_of(Grid(), scores, grid)
    cut = region_of(Grid(), list(scores.split(77)), grid)
    assert torch.equal(whole.units, cut.units)
    assert torch.equal(top_units(whole.masked(scores), 20), top_units(cut.masked(list(scores.split(77))), 20))


def test_equal_scores_are_drawn_for_with_the_seed():
    grid, flat = UnitGrid(20, 20), torch.ones(400)
    regions = [tuple(region_of(Grid(), flat, grid, seed=seed).units.tolist()) for seed in range(5)]
    assert len(set(regions)) == 5
    assert regions[3] == tuple(region_of(Grid(), flat, grid, seed=3).units.tolist())


def test_random_supports_reach_every_row_and_column():
    grid, seen = UnitGrid(10, 12), set()
    for seed in range(60):
        seen |= set(select_units(Random(), None, grid, 4, generator=drawn(seed), pattern=Grid()).tolist())
    assert tuple(map(len, lines(torch.tensor(sorted(seen)), 12))) == (10, 12)


def test_a_move_gives_up_the_weakest_whole_lines_and_no_more_units_than_it_drops():
    grid, pattern = UnitGrid(8, 8), Grid(0.5, 1.0, turnover=1.0)
    units = torch.tensor([0, 1, 8, 9, 10, 16, 17, 24])
    importance = torch.tensor([5.0, 5, 1, 1, 1, 2, 2, 9])  # rows sum to 10, 3, 4, 9 with 2, 3, 2, 1 units

    def leave(count):
        return units[pattern.leaving(units, importance, count, grid, 0)].tolist()

    assert leave(6) == [8, 9, 10]  # 3 by rows; all columns are in the grid, so that none has to make room
    assert leave(5) == []  # the weakest row has more units than half of those that leave
    assert leave(8) == []  # everything leaves anyway


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_rows_and_columns_are_refused(granularity):
    with pytest.raises(ValueError, match=f"'lin' has granularity '{granularity}'"):
        Grid().check_grid(UnitGrid(8, 8, granularity), "lin")


def test_a_count_beyond_the_grid_and_units_outside_of_any_are_refused_by_name():
    with pytest.raises(ValueError, match=r"has 16 places in the 16x16 weight of 'lin'.*wants 17 entry"):
        select_units("magnitude", torch.rand(16, 16), UnitGrid(16, 16), 17, pattern=Grid(), name="lin")
    with pytest.raises(ValueError, match="units of 'lin' lie in 5 rows and 1 columns"):
        Grid().check_units(torch.arange(0, 80, 16), UnitGrid(16, 16), "lin")


@pytest.mark.parametrize("options", [{"rows": 0.0}, {"columns": 1.5}, {"turnover": -0.1}])
def test_fractions_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Grid(**options)


def test_no_pattern_is_everywhere():
    grid, scores = UnitGrid(6, 7), torch.rand(42)
    region = region_of(None, scores, grid)
    assert isinstance(region, Everywhere)
    assert torch.equal(next(iter(region.masked(scores)())), scores)
    assert region.size == 42
