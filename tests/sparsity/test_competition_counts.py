"""SNELLA's outer competition: budgets shared out by score under caps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_sparse_peft.sparsity import competition_counts

layers = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), st.integers(1, 10**6)), min_size=1, max_size=12
)


def named(pairs) -> tuple[dict[str, float], dict[str, int]]:
    return {f"l{i}": score for i, (score, _) in enumerate(pairs)}, {f"l{i}": size for i, (_, size) in enumerate(pairs)}


@given(layers, st.floats(0, 1))
def test_counts_use_up_the_budget_and_no_layer_is_overfull(pairs, share):
    scores, sizes = named(pairs)
    budget = round(share * sum(sizes.values()))
    counts = competition_counts(scores, sizes, budget)
    assert sum(counts.values()) == budget
    assert all(0 <= counts[name] <= sizes[name] for name in sizes)


@given(layers, st.floats(0, 1), st.integers(0, 11))
def test_a_doubled_score_never_lowers_its_layers_count(pairs, share, which):
    scores, sizes = named(pairs)
    budget = round(share * sum(sizes.values()))
    name = f"l{which % len(pairs)}"
    before = competition_counts(scores, sizes, budget)[name]
    assert competition_counts({**scores, name: 2 * scores[name]}, sizes, budget)[name] >= before


@given(st.integers(1, 10), st.integers(1, 10**5), st.floats(1e-6, 1e6), st.floats(0, 1))
def test_equal_scores_give_equal_layers_one_sparsity(count, size, score, share):
    scores, sizes = named([(score, size)] * count)
    counts = competition_counts(scores, sizes, round(share * size * count)).values()
    assert max(counts) - min(counts) <= 1


def test_shares_follow_the_scores_and_the_surplus_of_full_layers_follows_them_too():
    # 100 by 5:3:2 offers 50, 30, 20; the first holds 20, its 30 left go 3:2.
    assert competition_counts({"a": 5, "b": 3, "c": 2}, {"a": 20, "b": 60, "c": 90}, 100) == {"a": 20, "b": 48, "c": 32}
    # Once more: b fills up at 40, and c takes the rest.
    assert competition_counts({"a": 5, "b": 3, "c": 2}, {"a": 20, "b": 40, "c": 90}, 100) == {"a": 20, "b": 40, "c": 40}


def test_scores_of_zero_everywhere_share_in_proportion_to_size():
    assert competition_counts({"a": 0, "b": 0}, {"a": 100, "b": 300}, 200) == {"a": 50, "b": 150}


def test_a_surplus_that_no_score_claims_is_still_used_up():
    counts = competition_counts({"a": 1, "b": 0, "c": 0}, {"a": 10, "b": 100, "c": 300}, 210)
    assert counts == {"a": 10, "b": 50, "c": 150}


def test_the_sum_is_exact_at_the_size_of_large_models():
    sizes = {f"l{i}": 4096 * 14336 for i in range(224)}
    scores = {name: 1.0 + i / 7 for i, name in enumerate(sizes)}
    budget = round(0.7 * sum(sizes.values()))
    assert sum(competition_counts(scores, sizes, budget).values()) == budget


@pytest.mark.parametrize(
    ("scores", "sizes", "budget", "message"),
    [
        ({"a": 1.0}, {"a": 5}, 6, "budget=6 must be between 0 and the 5"),
        ({"a": 1.0}, {"a": 5}, -1, "budget=-1"),
        ({"a": float("nan")}, {"a": 5}, 1, "score of 'a' is nan"),
        ({"a": -1.0}, {"a": 5}, 1, "score of 'a' is -1.0"),
        ({"a": 1.0}, {"b": 5}, 1, "same layers.*a, b"),
        ({}, {}, 0, "no layers at all"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(scores, sizes, budget, message):
    with pytest.raises(ValueError, match=message):
        competition_counts(scores, sizes, budget)
