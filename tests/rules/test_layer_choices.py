"""Scores of layers by outliers and gradients, from their definitions; turns of cyclic choices."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from hf_sparse_peft import SwitchLayers
from hf_sparse_peft.rules import Cyclic, LargestGradient, Outliers
from hf_sparse_peft.rules.layer_choices import block_score, largest_blocks, outlier_fraction

F64 = torch.float64


def run_of(stacks, saved=None):
    names = [f"{stack}.layers.{at}" for stack, count in stacks.items() for at in range(count)]
    return SimpleNamespace(seed=7, saved=saved or {}, memory=SimpleNamespace(layers=dict.fromkeys(names)))


def test_outliers_are_counted_over_all_linears_of_a_layer_by_one_mean():
    first, second = torch.tensor([1.0] * 7 + [13.0]), torch.tensor([0.1] * 7 + [0.9])
    assert outlier_fraction([first, second], 4) == 0.0625
    alone = [outlier_fraction([one], 4) for one in (first, second)]
    assert sum(alone) / 2 == 0.125  # a mean of the linears' fractions is another number
    assert outlier_fraction([torch.ones(4)], 4) == 0


def test_the_norm_decides_which_block_is_the_largest_and_ties_go_to_the_first():
    blocks = [[torch.tensor([3.0, 0.0])], [torch.tensor([2.0]), None, torch.tensor([2.0])]]
    euclidean, sums = ([float(block_score(block, norm)) for block in blocks] for norm in (2, 1))
    assert euclidean == pytest.approx([3, 8**0.5])
    assert sums == [3, 4]
    assert largest_blocks(euclidean, 1) == [0]
    assert largest_blocks(sums, 1) == [1]
    assert largest_blocks([2.0, 3.0, 3.0, 1.0], 2) == [1, 2]
    assert largest_blocks([2.0, 2.0, 2.0], 1) == [0]
    assert largest_blocks([0.0, 1.0, 0.0], 2) == [1]  # a block without a gradient is never chosen
    assert largest_blocks([0.0, 0.0], 1) == []
    assert float(block_score([None])) == 0


def test_gauss_southwell_lipschitz_picks_the_block_of_the_largest_decrease():
    lipschitz, gradients = [1.0, 16.0, 4.0], [torch.tensor([2.0]), torch.tensor([6.0]), torch.tensor([5.0])]
    decrease = [float(g.square().sum()) / (2 * constant) for g, constant in zip(gradients, lipschitz, strict=True)]
    scores = [float(block_score([g], 2, constant)) for g, constant in zip(gradients, lipschitz, strict=True)]
    assert [score**2 / 2 for score in scores] == pytest.approx(decrease)
    assert largest_blocks(scores, 1) == [2]
    assert largest_blocks([float(g) for g in gradients], 1) == [1]


@pytest.mark.parametrize("norm", [2, 1])
def test_the_diagonal_rule_divides_each_entry_by_the_root_of_its_bound(norm):
    gradients, bounds = (
        [torch.tensor([3.0, -4.0]), torch.tensor([[2.0]])],
        [torch.tensor([9.0, 4.0]), torch.tensor(1.0)],
    )
    parts = torch.tensor([3 / 3, 4 / 2, 2 / 1], dtype=F64)
    expected = parts.sum() if norm == 1 else parts.square().sum().sqrt()
    assert float(block_score(gradients, norm, bounds)) == pytest.approx(float(expected))
    first, second = [torch.tensor([3.0, 0.0])], [torch.tensor([2.0, 2.0])]
    scores = [float(block_score(g, norm, [torch.ones(2)])) for g in (first, second)]
    assert largest_blocks(scores, 1) == [0 if norm == 2 else 1]  # bounds of 1: as Gauss-Southwell
    assert float(block_score([torch.zeros(2), None], norm, [0.0, 0.0])) == 0
    assert float(block_score([torch.ones(2)], norm, [0.0])) == float("inf")


def test_constants_and_kept_moments_are_asked_for_by_name():
    with pytest.raises(ValueError, match="lipschitz"):
        LargestGradient(by="lipschitz")
    with pytest.raises(ValueError, match="lipschitz"):
        LargestGradient(lipschitz=[1.0])
    rule = SwitchLayers(1, choice=LargestGradient(by="lipschitz", lipschitz=[1.0, 2.0]))
    with pytest.raises(ValueError, match="2 numbers for 4 layers"):
        rule.choice.begin(rule, run_of({"model": 4}))
    rule = SwitchLayers(1, moments="drop", choice=LargestGradient(by="diagonal"))
    with pytest.raises(ValueError, match="moments='keep'"):
        rule.choice.begin(rule, run_of({"model": 4}))


@pytest.mark.parametrize("order", ["ascending", "descending", "permutation"])
def test_every_layer_has_its_turn_in_a_cycle_of_each_stack(order):
    rule = SwitchLayers(2, every=3, choice=Cyclic(order))
    run = run_of({"encoder": 4, "decoder": 6})
    turns = [rule.choice.choose(rule, run, 3 * period) for period in range(6)]
    assert all(Counter(number < 4 for number in turn) == {True: 2, False: 2} for turn in turns)
    assert sorted(number for turn in turns[:2] for number in turn if number < 4) == [0, 1, 2, 3]
    assert sorted(number for turn in turns[:3] for number in turn if number >= 4) == [4, 5, 6, 7, 8, 9]
    if order == "ascending":
        assert turns[0] == [0, 1, 4, 5]
    elif order == "descending":
        assert turns[0] == [2, 3, 8, 9]
    else:
        assert len({tuple(turn) for turn in turns}) > 3
        assert turns == [rule.choice.choose(rule, run, 3 * period) for period in range(6)]
    odd = SwitchLayers(2, every=1, choice=Cyclic(order))
    assert all(len(odd.choice.choose(odd, run_of({"model": 5}), step)) == 2 for step in range(9))


def test_layers_are_drawn_as_often_as_their_outliers_say():
    fractions, counts = [0.1, 0.0, 0.3, 0.6], Counter()
    rule = SwitchLayers(1, every=1, choice=Outliers())
    run = run_of({"model": 4}, {"outliers": fractions})
    for step in range(10_000):
        counts.update(rule.choice.choose(rule, run, step))
    assert [counts[at] / 10_000 for at in range(4)] == pytest.approx(fractions, abs=0.015)
