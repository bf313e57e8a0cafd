"""Every rule on one example, against numbers that were worked out apart from this package (float64, from the papers'
equations or the authors' code)."""

from dataclasses import replace

import pytest
import torch
from worked_example import F1, F2, T1, T2, GivenMasks, deltas, merged

from hf_sparse_peft.merging import (
    Agreeing,
    AllWeights,
    ByNorm,
    ByProbability,
    ByQ,
    DareK,
    DropByRank,
    ElectedSign,
    Holders,
    Merge,
    get_merge,
)


def check(found, expected, **close):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0, **close)


BOTH = deltas(T1, T2)
ALONE = deltas(T1)


def test_sum_mean_and_mean_over_holders():
    check(merged(get_merge("sum"), BOTH), [0.4, -0.35, 0.7, 0.4, -1.4, 0, 0, -0.2])
    check(merged(get_merge("lt-sft-composition"), BOTH), [0.4, -0.35, 0.7, 0.4, -1.4, 0, 0, -0.2])
    check(merged(get_merge("soup"), BOTH), [0.2, -0.175, 0.35, 0.2, -0.7, 0, 0, -0.1])
    check(merged(get_merge("soup"), BOTH, weights=[3.0, 3.0]), [0.2, -0.175, 0.35, 0.2, -0.7, 0, 0, -0.1])
    over_holders = Merge(consensus=Holders(), normalise=Agreeing())
    check(merged(over_holders, BOTH), [0.2, -0.175, 0.7, 0.4, -0.7, 0, 0, -0.1])


@pytest.mark.parametrize(
    ("tie", "at_six"),
    [("majority", -0.2), ("plus", 0.2), ("minus", -0.2)],
)
def test_ties_without_trimming_in_every_rule_for_a_sum_of_zero(tie, at_six):
    expected = [0.9, -0.175, 0.7, 0.4, -0.7, 0, at_six, -0.3]
    check(merged(get_merge("ties", density=1.0, tie=tie), BOTH), expected)
    check(merged(get_merge("ties", density=1.0, tie=tie, missing="zero"), BOTH), expected)


@pytest.mark.parametrize(
    ("density", "count", "expected"),
    [
        (0.5, "code", [0.9, -0.25, 0.7, 0.4, -0.7, 0, -0.2, -0.3]),
        (0.5, "exact", [0.9, -0.25, 0.7, 0.4, -0.7, 0, 0, -0.3]),
        (0.25, "code", [0.9, 0, 0.7, 0.4, -0.7, 0, 0, 0]),
        (0.25, "exact", [0.9, 0, 0.7, 0, -0.7, 0, 0, 0]),
    ],
)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_ties_trimmed_as_the_paper_and_as_the_code_that_keeps_one_more(density, count, expected, scope):
    method = get_merge("ties", density=density, count=count, scope=scope, missing="zero")
    check(merged(method, BOTH), expected)


def test_ties_counts_entries_that_are_stored_unless_told_otherwise():
    # T1 stores 6 and T2 stores 7: a half are 3 of each.
    check(merged(get_merge("ties", density=0.5), BOTH), [0.9, 0, 0.7, 0.4, -0.7, 0, 0, 0])


def test_ties_with_weights_of_a_half_is_half_of_it_and_equal_to_upstreams():
    from peft.utils.merge_utils import ties

    method = get_merge("ties", density=0.5, scope="tensor", tie="plus", missing="zero")
    half = merged(method, BOTH, weights=[0.5, 0.5])
    check(half, [0.45, -0.125, 0.35, 0.2, -0.35, 0, 0, -0.15])
    tensors, weights = list(BOTH.filled().values), torch.tensor([0.5, 0.5], dtype=torch.float64)
    torch.testing.assert_close(half, ties(tensors, weights, 0.5), atol=1e-12, rtol=0)


def test_ties_of_weighted_votes_is_mergekits_and_of_plain_ones_pefts():
    pair = deltas((1.0,), (-0.6,))
    check(merged(get_merge("ties", density=1.0), pair, weights=[0.2, 0.8]), [0.2])
    check(merged(get_merge("ties", density=1.0, weighted=True), pair, weights=[0.2, 0.8]), [-0.6])


def test_ties_of_opposite_updates_keeps_one_side():
    opposite = deltas((1.0, 2.0), (-1.0, -2.0))
    check(merged(get_merge("ties", density=1.0), opposite), [-1.0, -2.0])
    check(merged(get_merge("ties", density=1.0, tie="plus"), opposite), [1.0, 2.0])
    check(merged(get_merge("ties", density=1.0), deltas((1.0, 2.0), (-1.0, 3.0))), [1.0, 2.5])
    check(merged(get_merge("ties", density=1.0), ALONE), [0.9, -0.1, 0, 0.4, -0.6, 0, 0.2, -0.3])


def test_trimming_of_the_whole_model_empties_a_weight_of_tiny_values():
    large, tiny = (
        deltas((1.0, -2.0, 3.0, 4.0), (4.0, 3.0, 2.0, 1.0), name="a"),
        deltas((0.1, 0.2), (0.2, 0.1), name="b"),
    )
    everywhere = merged(get_merge("ties", density=0.5), large, tiny)
    assert not everywhere[1].any()
    each = merged(get_merge("ties", density=0.5, scope="tensor"), large, tiny)
    assert each[1].count_nonzero() == 2


def test_dare_with_given_masks_and_with_votes():
    dare = Merge(GivenMasks(), ByProbability())
    check(merged(dare, BOTH), [1.8, -0.5, 1.4, 0.8, -1.6, 0, 0, 0.2])
    voted = replace(dare, consensus=ElectedSign(), normalise=Agreeing())
    check(merged(voted, BOTH), [1.8, -0.5, 1.4, 0.8, -1.6, 0, 0.4, 0.2])


def test_darex_norm_and_dare_k_with_the_same_masks():
    check(merged(Merge(GivenMasks(), ByQ(0.8)), BOTH), [1.125, -0.3125, 0.875, 0.5, -1.0, 0, 0, 0.125])
    check(merged(Merge(GivenMasks(), ByQ(1.0, {"w": 0.8})), BOTH), [1.125, -0.3125, 0.875, 0.5, -1.0, 0, 0, 0.125])
    factors = 1.666667, 1.243902
    for row, factor, mask in zip((T1, T2), factors, ("10110110", "01101111"), strict=True):
        found = merged(Merge(GivenMasks((mask,)), ByNorm()), deltas(row))
        check(found, [0 if one is None or m == "0" else one * factor for one, m in zip(row, mask, strict=True)])
    dare_k = Merge(GivenMasks(("10110110",)), DareK(0.5))
    check(merged(dare_k, ALONE), [1.35, -0.05, 0, 0.6, -0.3, 0, 0.3, -0.15])


def test_della_keeps_with_probabilities_by_rank():
    sparsify = DropByRank(0.7, 0.07)
    kept = sparsify(ALONE, None, 0)
    check(kept.probability[0], [0.77, 0.63, 0.714, 0.742, 0.658, 0.686])
    whole = sparsify(ALONE.filled(), None, 0).probability[0]
    check(whole[[0, 1, 3, 4, 6, 7]], [0.77, 0.67, 0.73, 0.75, 0.69, 0.71])
    assert sorted(whole[[2, 5]].tolist()) == pytest.approx([0.63, 0.65])  # two zeros: their order is drawn
    check(sparsify(deltas((0.5, None, -0.2)), None, 0).probability[0], [0.77, 0.63])
    check(sparsify(deltas((0.5, None)), None, 0).probability[0], [0.7])  # the code divides 0 by 0


def test_breadcrumbs_cuts_a_band_of_each_row():
    options = {"keep": 0.25, "outliers": 0.125, "missing": "zero"}
    one, two = (merged(get_merge("breadcrumbs", scale=1.0, **options), deltas(row)) for row in (T1, T2))
    check(one, [0, 0, 0, 0.4, -0.6, 0, 0, 0])
    check(two, [-0.5, 0, 0.7, 0, 0, 0, 0, 0])
    check(merged(get_merge("breadcrumbs", scale=0.4, **options), BOTH), [-0.2, 0, 0.28, 0.16, -0.24, 0, 0, 0])


def test_breadcrumbs_in_either_order_on_stored_entries_and_on_rows_of_none_or_one():
    from hf_sparse_peft.merging import Band

    row = tuple(float(n) for n in range(1, 11))
    first = Band(0.3, 0.2)(deltas(row), None, 0).mask[0]
    assert first.nonzero().squeeze(1).tolist() == [5, 6, 7]
    last = Band(0.3, 0.2, outliers_first=False)(deltas(row), None, 0).mask[0]
    assert last.nonzero().squeeze(1).tolist() == [7]
    top = Band(0.3, 0.0)(deltas(row), None, 0).mask[0]
    assert top.nonzero().squeeze(1).tolist() == [7, 8, 9]
    rows = deltas((1.0, None, None, 2.0, 3.0, 4.0), shape=(3, 2))
    assert Band(0.5, 0.5)(rows, None, 0).mask[0].tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.25, [0, 0, 0, 0, -0.65, 0, 0, 0]),
        (0.5, [0.6, -0.25, 0.7, 0.4, -0.65, 0, 0, 0]),
        (0.75, [0.6, -0.208175, 0.7, 0.4, -0.65, 0, 0, -0.3]),
    ],
)
def test_pcb_at_three_ratios(ratio, expected):
    check(merged(get_merge("pcb", ratio=ratio, scale=1.0, missing="zero"), BOTH), expected)


FISHERS = deltas(T1, T2, importance=(F1, F2))


def test_fisher_takes_the_mean_by_importance_with_and_without_norms():
    plain = get_merge("fisher", normalise_importance=False)
    check(merged(plain, FISHERS), [0.62, -0.175, 0.7, 0.4, -0.7, 0, 0.2, -0.2])
    found = merged(get_merge("fisher"), FISHERS)
    check(found, [0.481491, -0.194560, 0.7, 0.4, -0.726079, 0, 0.2, -0.155015])
    scaled = replace(FISHERS, importance=FISHERS.importance * torch.tensor([[7.0], [1.0]], dtype=torch.float64))
    torch.testing.assert_close(merged(get_merge("fisher"), scaled), found, atol=1e-12, rtol=0)
    equal = replace(FISHERS, importance=torch.ones_like(FISHERS.importance))
    check(merged(plain, equal), [0.2, -0.175, 0.7, 0.4, -0.7, 0, 0, -0.1])


def test_cape_adds_the_difference_of_expert_and_anti_expert_to_the_base():
    base = (0.1,) * 8
    expert = tuple(0.1 + (one or 0.0) for one in T1)
    anti = tuple(0.1 + (one or 0.0) for one in T2)
    method = get_merge("cape", alpha=0.6)
    found = merged(method, deltas(base, expert, anti), weights=method.weights)
    check(found, [0.94, 0.19, -0.32, 0.34, 0.22, 0.1, 0.34, -0.14])
    same = merged(method, deltas(base, expert, expert), weights=method.weights)
    check(same, list(base))


def test_soup_divides_by_all_models_also_where_one_alone_holds_an_entry():
    three = deltas((1.0, None), (None, 2.0), (3.0, None))
    check(merged(Merge(normalise=AllWeights()), three), [4 / 3, 2 / 3])
