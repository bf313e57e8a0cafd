"""The best sub-grid of a score: LoSiA's three greedy pairs, and their refinement."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sparse_peft.sparsity import best_subgrid

WORKED = torch.tensor([[9.0, 0, 0, 1], [0, 5, 4.5, 0], [8, 0, 0, 0], [0, 4, 4, 0]])


def held(scores, rows, columns) -> float:
    return float(scores[rows.long()][:, columns.long()].sum())


def greedy_pairs(scores, r, c):
    def top(sums, k):
        return sums.argsort(descending=True)[:k]

    rows, columns = top(scores.sum(1), r), top(scores.sum(0), c)
    return [(rows, columns), (rows, top(scores[rows].sum(0), c)), (top(scores[:, columns].sum(1), r), columns)]


def test_losias_worked_choice():
    rows, columns = best_subgrid(WORKED, 2, 2, refined=False)
    assert (rows.tolist(), columns.tolist()) == ([0, 2], [0, 1])
    assert [held(WORKED, *pair) for pair in greedy_pairs(WORKED, 2, 2)] == [14, 14, 17]


def test_refinement_ends_at_the_optimum_of_the_worked_choice():
    rows, columns = best_subgrid(WORKED, 2, 2)
    assert (rows.tolist(), columns.tolist()) == ([0, 2], [0, 3])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_it_is_never_worse_than_any_greedy_pair_and_never_better_than_the_optimum(m, n, seed, data):
    r, c = data.draw(st.integers(1, m)), data.draw(st.integers(1, n))
    scores = torch.rand(m, n, generator=torch.Generator().manual_seed(seed))
    optimum = max(
        float(scores[list(rows)][:, list(columns)].sum())
        for rows in itertools.combinations(range(m), r)
        for columns in itertools.combinations(range(n), c)
    )
    greedy = max(held(scores, *pair) for pair in greedy_pairs(scores, r, c))
    for refined in (False, True):
        rows, columns = best_subgrid(scores, r, c, refined=refined)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert columns.tolist() == sorted(set(columns.tolist()))
        assert (rows.numel(), columns.numel()) == (r, c)
        found = held(scores, rows, columns)
        assert greedy - 1e-5 <= found <= optimum + 1e-5
        assert refined or found == pytest.approx(greedy)


def test_ties_are_drawn_for_and_follow_the_seed():
    flat = torch.ones(40, 40)
    drawn = [best_subgrid(flat, 4, 4, seed=seed) for seed in range(6)]
    assert len({tuple(rows.tolist()) for rows, _ in drawn}) > 3
    assert len({tuple(columns.tolist()) for _, columns in drawn}) > 3
    again = best_subgrid(flat, 4, 4, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again, drawn[3], strict=True))


@pytest.mark.parametrize(("rows", "columns", "message"), [(0, 1, "rows=0"), (5, 1, "rows=5.*4"), (1, 5, "columns=5")])
def test_sides_that_the_weight_does_not_have_are_refused(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        best_subgrid(WORKED, rows, columns)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        best_subgrid(torch.full((4, 4), float("nan")), 2, 2)
