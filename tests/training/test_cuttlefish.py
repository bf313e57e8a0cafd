"""Cuttlefish's stable ranks, detector and cut, against NumPy in float64 and worked numbers."""

import math
import warnings

import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model
from training_toolbox import Hook, StopAt, all_state, differences, layers_of, run
from transformers import Trainer

from hf_sparse_peft import (
    AdamWSpec,
    AlternateModules,
    Controller,
    FrobeniusDecay,
    SparseLoraConfig,
    StableRank,
    methods,
    trainer_options,
)
from hf_sparse_peft.rules.stable_rank import factorize, measured

R = 4
SOON = {"every": 2, "window": 2, "last": 2, "threshold": 10.0, "first": 1}


def adapted(rules, base: str = "fp32", **options):
    torch.manual_seed(2)
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": R, "init_weights": False, **options}
    return get_peft_model(tiny.base(base, layers=1), SparseLoraConfig(density=0.0, schedule=rules, **options))


def space_of(layer):
    (found,) = [space for space in layer.unit_spaces("default") if space.kind == "rank"]
    return found


def ranks(model) -> list[int]:
    return [int(layer.sparse_lora_rank_mask["default"].sum()) for layer in layers_of(model)]


def update(layer) -> np.ndarray:
    return layer.get_delta_weight("default").detach().double().numpy()


def stable_rank(weight: np.ndarray) -> float:
    return (weight**2).sum() / np.linalg.norm(weight, 2) ** 2


def settled(series, window: int, last: int, threshold: float) -> bool:
    average = [series[0]]
    for value in series[1:]:
        average.append(2 / (window + 1) * value + (1 - 2 / (window + 1)) * average[-1])
    return np.abs(np.gradient(average))[-last:].mean() <= threshold


def first_stable(rule, series) -> int | None:
    """The measurement, numbered from 0 after the initial value."""
    found = (at for at in range(len(series) - 1) if rule.is_stable(series[: at + 2], rule.threshold))
    return next(found, None)


def test_stable_ranks_are_those_of_the_dense_update():
    model = adapted([StableRank()])
    for layer in layers_of(model):
        space = space_of(layer)
        assert measured(space) == pytest.approx(stable_rank(update(layer)), rel=1e-4)
        before = measured(space)
        space.B.data *= 7.0
        assert measured(space) == pytest.approx(before, abs=2e-4)
        assert 1 < before < R
        A, B = torch.zeros_like(space.A), torch.zeros_like(space.B)
        A[:, :R] = B[:R] = torch.eye(R)
        space.A.data, space.B.data = A, B
        assert measured(space) == R
        space.B.data[:, 1:] = 0.0
        assert measured(space) == 1
        space.B.data.zero_()
        assert measured(space) is None
        space.B.data[0, 0] = float("nan")
        assert measured(space) is None


def test_detection_of_the_worked_series():
    falling = [float(int(100 + 412 * math.exp(-i / 6))) for i in range(100)]
    assert first_stable(StableRank(), falling) == 62
    assert first_stable(StableRank(window=1), falling) == 42
    assert first_stable(StableRank(last=1), falling) == 57
    assert first_stable(StableRank(), [3.0] * 40) == 15
    assert first_stable(StableRank(window=5, last=5, threshold=0.411, first=5), [3.0] * 40) == 5
    ramps = {slope: [slope * i for i in range(61)] for slope in (0.05, 0.2)}
    assert StableRank().is_stable(ramps[0.05], 0.04997)
    assert not StableRank().is_stable(ramps[0.05], 0.04995)
    assert not StableRank().is_stable(ramps[0.2], 0.1)


def test_detection_is_that_of_the_equations_on_random_series():
    generator, found = np.random.default_rng(0), set()
    for window, last, threshold in ((15, 11, 0.1), (5, 5, 0.411), (2, 3, 0.3)):
        rule = StableRank(window=window, last=last, threshold=threshold, first=0)
        for length in range(2, 40):
            series = generator.normal(0, 0.7, length).tolist()
            expected = settled(series, window, last, threshold)
            assert rule.is_stable(series, threshold) == expected
            found.add(bool(expected))
    assert found == {True, False}


def test_thresholds_relax_with_the_modules_that_are_left_and_ranks_are_scaled_as_published():
    assert [StableRank().threshold_for(n) for n in (4, 3, 2, 1)] == pytest.approx([0.1, 0.1, 0.25, 0.5])
    imagenet = StableRank(threshold=0.411, relaxed_at=(9, 4))
    assert [imagenet.threshold_for(n) / 0.411 for n in (10, 9, 5, 4, 1)] == pytest.approx([1, 2.5, 2.5, 5, 5])
    for initial in (1.3, 2.7, 3.1, 7.9):
        assert StableRank(scaled=True).rank([initial], 8) == 8
    assert StableRank(scaled=True).rank([4.0, 2.1], 8) == 5
    assert StableRank(scaled=True).rank([4.0, 5.0], 8) == 8
    assert [StableRank().rank([4.0, last], 8) for last in (1.0, 2.0, 2.1)] == [1, 2, 3]
    assert StableRank(floor=0.5).rank([4.0, 1.0], 7) == 4


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_all_are_cut_at_once_to_balanced_factors_of_the_truncated_svd_and_moments_are_fresh(base, tmp_path):
    model, cut, series = adapted([StableRank(**SOON)], base), [], []

    def before(step, model, optimizer):
        weights = [update(layer) for layer in layers_of(model)]
        cut.append((step, weights, ranks(model)))
        series.extend([[stable_rank(weight) for weight in weights]] if step % 2 == 0 else [])

    def after(step, model, optimizer):
        state = getattr(optimizer, "optimizer", optimizer).state
        moments = [state[space_of(layer).A]["exp_avg"].any() for layer in layers_of(model)]
        _, weights, was = cut[-1]
        if step != 6:
            assert ranks(model) == was
            assert all(moments)
            return
        assert was == [R] * 3
        for layer, weight, sr, fresh in zip(layers_of(model), weights, series[-1], moments, strict=True):
            space = space_of(layer)
            rank = math.ceil(sr)
            assert space.count == rank < R
            assert not fresh
            assert not state[space.B]["exp_avg_sq"].any()
            U, S, Vh = np.linalg.svd(weight, full_matrices=False)
            np.testing.assert_allclose(update(layer), (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=2e-6)
            A, B = (one.detach().double()[at] for one, at in ((space.A, slice(rank)), (space.B.t(), slice(rank))))
            torch.testing.assert_close(B @ B.t(), A @ A.t(), rtol=1e-5, atol=1e-6)
            assert space.gate.tolist() == [1.0] * rank + [0.0] * (R - rank)

    hooks = {"before": [Hook(on_step_end=before)], "after": [Hook(on_step_end=after)]}
    run(model, tmp_path, 9, optimizer="default", **hooks)
    assert len(cut) == 9
    # An initial measurement and two more: a module may be stable from the third on.
    assert [was == [R] * 3 for _, _, was in cut] == [True] * 6 + [False] * 3
    delta = [layer.get_delta_weight("default") for layer in layers_of(model)]
    model.base_model.compact("default")
    for layer, was in zip(layers_of(model), delta, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), was, rtol=1e-5, atol=1e-7)


def test_factors_of_full_rank_stay_as_they_are():
    layer = layers_of(adapted([StableRank()]))[0]
    space = space_of(layer)
    before = space.A.detach().clone()
    factorize(space, R, None)
    assert torch.equal(space.A, before)


@pytest.mark.parametrize("middle", [3, 5, 7])
def test_a_run_that_stops_in_the_middle_goes_on_to_the_bit(middle, tmp_path):
    def last_state(folder, resume=None, stop=None):
        model, found = adapted([StableRank(**SOON)]), {}
        hook = Hook(on_step_end=lambda step, model, optimizer: found.update(now=all_state(model, optimizer)))
        callbacks = [hook] if stop is None else [hook, StopAt(stop)]
        run(model, tmp_path / folder, 10, optimizer="default", after=callbacks, resume=resume)
        return found["now"], ranks(model)

    whole, expected = last_state("whole")
    last_state("stopped", stop=middle)
    again, found = last_state("again", resume=str(tmp_path / "stopped" / f"checkpoint-{middle}"))
    assert not differences(whole, again)
    assert found == expected
    assert max(expected) < R


def test_modules_are_waited_for_and_one_that_is_held_still_is_cut_when_it_trains_again(tmp_path):
    rules = [AlternateModules(period_steps=3), StableRank(**{**SOON, "every": 1, "first": 0})]
    model, trained, found = adapted(rules), [], []

    def after(step, model, optimizer):
        trained.append([space_of(layer).trains for layer in layers_of(model)])
        found.append(ranks(model))

    run(model, tmp_path, 24, optimizer="default", after=[Hook(on_step_end=after)])
    # Each is stable at its second measurement; all that were not held at the last of these are cut at once.
    stop = max(np.flatnonzero(steps)[1] for steps in np.array(trained).T)
    expected = [next(at for at in range(stop, 24) if trained[at][number]) for number in range(3)]
    assert [next(at for at in range(24) if found[at][number] < R) for number in range(3)] == expected
    assert min(expected) == stop
    assert max(expected) > stop


def test_layers_without_gradient_keep_rank_and_factors_and_are_named(tmp_path):
    model = adapted([StableRank(**{**SOON, "every": 1})])
    before = {name: one.detach().clone() for name, one in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"the rank was not cut in any of the 3 layers \(.*q_proj"):
        run(model, tmp_path, 5, optimizer="default", decay=0.0, data=tiny.TokenData(masked=True))
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert ranks(model) == [R] * 3


def test_a_row_has_the_rule_and_what_cannot_work_is_refused():
    assert methods.get("cuttlefish").config.schedule == [StableRank()]
    with pytest.raises(ValueError, match=r"factor_masks cannot be combined with a gate"):
        SparseLoraConfig(factor_masks={"kind": "parallel"}, schedule=[StableRank()])
    model = adapted([StableRank()])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"StableRank\.every=None is an epoch"):
        Controller(model, optimizer, 4).__enter__()
    model = adapted([StableRank(2)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.warns(UserWarning, match=r"StableRank\.first=15 and every=2 take measurements up to step 34"):
        Controller(model, optimizer, 20).__enter__()


def test_a_run_whose_ranks_never_settle_says_so_at_its_end(tmp_path):
    model = adapted([StableRank(**{**SOON, "every": 1, "threshold": 1e-9})])
    with pytest.warns(UserWarning, match=r"StableRank cut no rank: .* 3 modules \(.*q_proj.*threshold=1e-09"):
        run(model, tmp_path, 6, optimizer="default")
    assert ranks(model) == [R] * 3


def test_truncated_stable_ranks_are_those_of_the_released_code(tmp_path):
    model, found = adapted([StableRank(**SOON, truncated=True)]), []

    def before(step, model, optimizer):
        found.append([stable_rank(update(layer)) for layer in layers_of(model)])

    run(model, tmp_path, 7, optimizer="default", before=[Hook(on_step_end=before)])
    assert ranks(model) == [int(value) for value in found[5]]
    assert ranks(model) != [math.ceil(value) for value in found[5]]


@pytest.mark.parametrize("gate", [None, "ones"])
def test_frobenius_decay_is_the_gradient_of_the_products_norm_and_no_weight_decay_comes_on_top(gate, tmp_path):
    model = adapted([FrobeniusDecay(0.3)], gate=gate, optimizer=AdamWSpec())
    layer, seen = layers_of(model)[0], []
    if gate:
        layer.sparse_lora_gate["default"].data.copy_(torch.tensor([0.5, 2.0, -1.0, 0.0]))
        layer.sparse_lora_gate["default"].requires_grad_(False)
    A, B = (getattr(layer, f"sparse_lora_{one}")["default"] for one in "AB")
    g = np.ones(R) if gate is None else layer.sparse_lora_gate["default"].double().numpy()
    a, b = A.detach().double().numpy(), B.detach().double().numpy()
    W = b * g @ a
    expected = {"A": 0.3 * (b * g).T @ W, "B": 0.3 * W @ a.T * g}

    def look(step, model, optimizer):
        seen.append({"A": A.grad.double().numpy(), "B": B.grad.double().numpy()})
        groups = getattr(optimizer, "optimizer", optimizer).param_groups
        assert [g["weight_decay"] for g in groups for p in g["params"] if p is A or p is B] == [0.0, 0.0]

    masked = tiny.TokenData(masked=True)  # the loss itself has no gradient
    with warnings.catch_warnings(action="ignore"):
        options = trainer_options(model, tiny.arguments(tmp_path, 1, weight_decay=0.1))
        options["callbacks"] = [*options["callbacks"], Hook(on_pre_optimizer_step=look)]
        Trainer(model=model, train_dataset=masked, **options).train()
    for name, value in expected.items():
        np.testing.assert_allclose(seen[0][name], value, rtol=1e-5, atol=1e-7)


def test_cuttlefish_with_frobenius_decay_has_both_rules():
    rules = methods.get("cuttlefish", frobenius_decay=1e-3).config.schedule
    assert rules == [StableRank(), FrobeniusDecay(1e-3)]
