"""One budget for components and entries: what it costs, who wins, and that it is kept."""

import pytest
import tiny
import torch
from peft import get_peft_model
from training_toolbox import Hook, layers_of, run

from hf_sparse_peft import Allocate, Fraction, Numbers, SparseLoraConfig
from hf_sparse_peft.sparsity import affordable


def adapted(budget, base="fp32", **options):
    torch.manual_seed(2)
    rule = Allocate(("rank", "support"), budget, **{"every": 2, "initial_warmup": 0.0, **options})
    config = SparseLoraConfig(
        r=4, density=0.2, target_modules=["q_proj", "down_proj"], schedule=[rule], task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny.base(base, layers=2), config)


def spaces(model):
    return [space for layer in layers_of(model) for space in layer.unit_spaces("default") if space.kind != "module"]


def numbers(model) -> int:
    return sum(space.count * space.unit_numel for space in spaces(model))


def greedy(scores, costs, total):
    """Best first; what does not fit is passed over."""
    taken, left = set(), total
    for unit in sorted(range(len(scores)), key=lambda unit: -scores[unit]):
        if costs[unit] <= left:
            taken.add(unit)
            left -= costs[unit]
    return taken


@pytest.mark.parametrize("seed", range(20))
def test_units_are_paid_for_in_the_order_of_their_scores(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, generator=generator)
    costs = torch.tensor([1, 1, 7, 30])[torch.randint(4, (40,), generator=generator)]
    total = int(torch.randint(1, int(costs.sum()), (), generator=generator))
    found = affordable(scores, costs, total, seed=0)
    assert set(found.nonzero().squeeze(1).tolist()) == greedy(scores.tolist(), costs.tolist(), total)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_numbers_follow_the_cubic_curve_and_end_at_the_budget(base, tmp_path):
    model = adapted(Fraction(0.4), base)
    start, seen = numbers(model), {}
    largest = max(space.unit_numel for space in spaces(model))
    run(model, tmp_path, 20, after=[Hook(on_step_end=lambda step, model, _: seen.update({step: numbers(model)}))])
    target = round(0.4 * start)
    for step, found in seen.items():
        if step % 2 == 0 and step < 14:
            budget = int(target + (start - target) * (1 - step / 14) ** 3)
            assert budget - largest < found <= budget, step  # what is left pays for no component
    assert target - largest < seen[14] == seen[20] <= target
    assert {space.kind for space in spaces(model) if space.count < space.initial} == {"rank", "support"}


def test_a_number_of_numbers_is_met_and_one_split_stays(tmp_path):
    model, seen = adapted(Numbers(900), every=None, initial_warmup=0.2), {}
    run(
        model, tmp_path, 10,
        after=[Hook(on_step_end=lambda step, m, _: seen.update({step: [s.alive().tolist() for s in spaces(m)]}))],
    )  # fmt: skip
    assert 900 - max(space.unit_numel for space in spaces(model)) < numbers(model) <= 900
    assert seen[1] != seen[2]
    assert all(seen[step] == seen[2] for step in range(2, 11))
