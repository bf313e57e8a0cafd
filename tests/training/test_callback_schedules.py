"""When things happen and how much: the schedules as pure functions against tables and hand computations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ties import best

from hf_sparse_peft import AccumulatedGradient, Allocate, AverageRank, Prune, Regrow
from hf_sparse_peft.rules.growth import choose_units
from hf_sparse_peft.sparsity import make_curve, stream_seed


@pytest.mark.parametrize(("interval", "collect"), [(20, 5), (4, 2), (1, 1), (3, 3), (7, 1), (5, 4)])
def test_moves_come_after_a_and_every_s_with_exactly_a_collected_updates_before_each(interval, collect):
    config, last = Regrow(every=interval, grow=AccumulatedGradient(steps=collect)), 4 * interval + collect
    moves = {collect + n * interval for n in range(5)}
    collected = {update for move in moves for update in range(move - collect + 1, move + 1)}
    for update in range(1, last + 1):
        assert config.moves_after(update) == (update in moves), update
        assert config.reads_at(update) == (update in collected), update
    # A phase begins right after a multiple of the interval: a resumed run tells the first step of one by that.
    assert {m - collect for m in moves} == {n * interval for n in range(5)}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_replaced_fraction_is_one_at_the_first_linear_move_and_its_schedule_later(schedule):
    curve = 0.4 if schedule == "constant" else make_curve(schedule, 0.4, 0.0)
    config = Regrow(every=10, grow=AccumulatedGradient(steps=5), fraction=curve)
    expected = {
        "linear": lambda p: 0.4 * (1 - p),
        "cosine": lambda p: 0.4 * (1 + math.cos(math.pi * p)) / 2,
        "constant": lambda p: 0.4,
    }[schedule]
    # The released code's cosine policy has no full first replacement; its linear one has.
    assert config.replaced_fraction(5, 100) == (1.0 if schedule == "linear" else pytest.approx(expected(0.05)))
    assert config.replaced_fraction(5, 100, True) == 1.0
    for update in (15, 25, 50, 75, 95, 100):
        assert config.replaced_fraction(update, 100) == pytest.approx(expected(update / 100), abs=1e-12)
    kept_start = Regrow(every=10, grow=AccumulatedGradient(steps=5), fraction=curve, replace_all_first=False)
    assert kept_start.replaced_fraction(5, 100) == pytest.approx(expected(0.05), abs=1e-12)


def test_living_share_is_one_before_the_window_cubic_inside_and_final_from_its_end_on():
    rule = Prune(final_fraction=0.2, start=0.25, end=0.75)
    for update, share in {0: 1.0, 25: 1.0, 50: 0.2 + 0.8 * 0.125, 75: 0.2, 90: 0.2, 100: 0.2}.items():
        assert rule.living_fraction(update, 100) == pytest.approx(share, abs=1e-12)
    for update in range(26, 75):
        by_hand = 0.2 + 0.8 * (1 - (update - 25) / 50) ** 3
        assert rule.living_fraction(update, 100) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("total", [7, 10, 13, 33, 101])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 1.0), (0.25, 0.74), (0.1, 0.36), (0.49, 0.51)])
def test_living_share_is_exactly_final_at_the_step_nearest_to_the_windows_end(begin, end, total):
    rule = Prune(final_fraction=0.3, start=begin, end=end)
    if round(end * total) > round(begin * total):
        assert rule.living_fraction(round(end * total), total) == 0.3
        assert rule.living_fraction(round(begin * total), total) == 1.0


def test_rank_budget_has_the_papers_integers_at_t_init_in_the_middle_and_at_t_minus_t_final():
    config = Allocate(budget=AverageRank(2), initial_warmup=0.1, final_warmup=0.3)
    start, target, total = 24, 12, 100  # falls from step 10 to step 70
    for update in (0, 1, 10):
        assert int(config.budget_at(start, target, update, total)) == 24
    assert int(config.budget_at(start, target, 40, total)) == 12 + int(12 * 0.125) == 13
    assert int(config.budget_at(start, target, 11, total)) == int(12 + 12 * (59 / 60) ** 3) == 23
    for update in (70, 71, 100):
        assert int(config.budget_at(start, target, update, total)) == 12
    curve = [int(config.budget_at(start, target, update, total)) for update in range(101)]
    assert curve == sorted(curve, reverse=True)


def test_rank_budget_stays_where_target_equals_start():
    config = Allocate(budget=AverageRank(4), initial_warmup=0.0, final_warmup=0.0)
    assert {int(config.budget_at(8, 8, update, 20)) for update in range(21)} == {8}


@st.composite
def a_move(draw):
    total = draw(st.integers(4, 60))
    alive = draw(st.integers(1, total))
    units = sorted(draw(st.permutations(range(total)))[:alive])
    candidates = sorted(draw(st.permutations(range(total)))[: draw(st.integers(0, total))])
    numbers = st.integers(0, 5)  # few values: ties are the rule
    importance = draw(st.lists(numbers, min_size=alive, max_size=alive))
    gradients = draw(st.lists(st.integers(-5, 5), min_size=len(candidates), max_size=len(candidates)))
    return units, importance, candidates, gradients, draw(st.integers(0, alive))


@settings(max_examples=100, deadline=None)
@given(a_move())
def test_choose_units_keeps_size_order_and_survivors_and_takes_the_strongest_rivals(case):
    units, importance, candidates, gradients, count = case
    chosen = choose_units(
        torch.tensor(units, dtype=torch.int32),
        torch.tensor(importance, dtype=torch.float32),
        torch.tensor(candidates, dtype=torch.int32),
        torch.tensor(gradients, dtype=torch.float32),
        count,
    ).tolist()
    assert len(chosen) == len(units)
    assert chosen == sorted(set(chosen))
    if not any(gradients):
        assert chosen == units  # nothing to choose by
        return
    drop, grow, back = (stream_seed(0, what, 0, "") for what in ("drop", "grow", "return"))
    dropped = [units[i] for i in best(importance, count, largest=False, seed=drop)]
    survivors = set(units) - set(dropped)
    assert survivors <= set(chosen)
    strength = dict(zip(candidates, map(abs, gradients), strict=True))
    rivals = sorted(set(candidates) - survivors)
    grown = {rivals[i] for i in best([strength[u] for u in rivals], min(count, len(rivals)), seed=grow)}
    assert grown <= set(chosen)
    if not rivals:
        assert chosen == units
        return
    # Fewer rivals than places: the most important of the dropped units fill them, nothing else does.
    rest = [u for u in dropped if u not in grown]
    worth = [importance[units.index(u)] for u in rest]
    returned = {rest[i] for i in best(worth, min(count - len(grown), len(rest)), seed=back)}
    assert set(chosen) == survivors | grown | returned


def test_choose_units_ranks_a_block_by_the_sum_of_its_summed_gradients():
    chosen = choose_units(
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([1.0, 2.0]),
        torch.tensor([2, 3], dtype=torch.int32),
        torch.tensor([[[9.0, 0.0], [0.0, 0.0]], [[-3.0, 3.0], [-3.0, 3.0]]]),
        1,
    )
    assert chosen.tolist() == [1, 3]
