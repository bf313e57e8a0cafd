"""IncreLoRA's growing ranks, against the equations in float64 and worked numbers."""

import copy

import pytest
import tiny
import torch
from peft import get_peft_model
from training_toolbox import Hook, StopAt, TokenData, all_state, differences, layers_of, moves_of, run
from transformers import Trainer

from hf_sparse_peft import (
    AgedAdamWSpec,
    AverageRank,
    GrowRank,
    Numbers,
    Orthogonality,
    Smoothed,
    SparseLoraConfig,
    trainer_options,
)
from hf_sparse_peft.rules import ConstantRate, OwnClock, RunRate

R, ALPHA = 6, 16
FAST = {"budget": AverageRank(3), "every": 2, "warmup": 2, "modules": 2}


def adapted(rule: GrowRank, base: str = "fp32", rules=(), seed: int = 2, **options):
    config = SparseLoraConfig(
        r=R, lora_alpha=ALPHA, density=0.0, target_modules=["q_proj", "v_proj", "down_proj"],
        schedule=[rule, *rules], task_type="CAUSAL_LM", **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    return get_peft_model(tiny.base(base, layers=1), config)


def ranks(model) -> list[int]:
    return [layer.alive_components("default") for layer in layers_of(model)]


def held(layer, name: str) -> torch.Tensor:
    return getattr(layer, f"sparse_lora_{name}")["default"].detach().clone()


class Reference:
    """The allocator by its equations, in float64, from gradients of the weights that autograd takes itself."""

    def __init__(self, model, rule: GrowRank) -> None:
        self.rule, self.layers = rule, layers_of(model)
        self.ranks = [1] * len(self.layers)
        self.smooth = [[0.0, 0.0] for _ in self.layers]
        self.history, self.deltas, self.gradients = {}, {}, {}
        for number, layer in enumerate(self.layers):
            layer.register_forward_hook(self.watch(number))

    def watch(self, number: int):
        def forward(layer, args, output):
            x = args[0].detach().double().flatten(0, -2)
            E, A, B = (held(layer, name).double() for name in ("gate", "A", "B"))
            E = E * layer.sparse_lora_scaling["default"] / (ALPHA / (self.ranks[number] + 1e-5))  # as the step has it
            self.deltas[number] = ALPHA / (self.ranks[number] + 1e-5) * (B * E) @ A

            def backward(gradient):
                G = gradient.detach().double().flatten(0, -2).t() @ x
                self.gradients[number] = self.gradients.get(number, 0) + G

            if output.requires_grad:
                output.register_hook(backward)

        return forward

    def step(self, t: int) -> None:
        """One call of the allocator, `t` from 0."""
        target = self.rule.budget.r * len(self.layers)
        if sum(self.ranks) < target:
            for number, G in self.gradients.items():
                score = float((self.deltas[number] * G).abs().sum()) / G.numel() ** 0.5
                mean, spread = self.smooth[number]
                mean = 0.85 * mean + 0.15 * score
                self.smooth[number] = [mean, 0.85 * spread + 0.15 * abs(score - mean)]
            if t > self.rule.warmup and t % self.rule.every == 0:
                order = sorted(range(len(self.layers)), key=lambda n: -self.smooth[n][0] * self.smooth[n][1])
                order = [n for n in order if self.ranks[n] < R]
                for number in order[: self.rule.modules]:
                    room = R - self.ranks[number]
                    self.ranks[number] += min(self.rule.grow_by, target - sum(self.ranks), room)
        self.gradients = {}
        self.history[t] = list(self.ranks)


@pytest.mark.parametrize("rules", [(), (Orthogonality(0.1),)], ids=["alone", "orthogonal"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_scores_and_growth_are_those_of_the_equations(accumulation, rules, tmp_path):
    rule = GrowRank(**FAST)
    model = adapted(rule, rules=rules)
    reference, seen = Reference(model, rule), {}

    def compare(step, model, optimizer):
        reference.step(step - 1)
        seen[step - 1] = ranks(model)
        for layer, expected in zip(layers_of(model), reference.smooth, strict=True):
            kept = [float(layer.rule_state("default")[f"{name}_module"]) for name in ("sensitivity", "uncertainty")]
            assert kept == pytest.approx(expected, rel=2e-4, abs=1e-12)

    run(
        model, tmp_path, 10, optimizer="default", accumulation=accumulation, max_grad_norm=1e-3,
        before=[Hook(on_optimizer_step=lambda *_: None)], after=[Hook(on_optimizer_step=compare)],
    )  # fmt: skip
    assert seen == reference.history
    assert len(set(map(tuple, seen.values()))) == 4  # 3 -> 5 -> 7 -> 9
    assert sum(ranks(model)) == 9


def test_growth_steps_are_the_worked_ones_and_nothing_overshoots(tmp_path):
    # In hundredths of the published 100: first at twice the warm-up, not at its end.
    model = adapted(GrowRank(every=3, warmup=3, modules=1))
    trainer = run(model, tmp_path / "one", 16, optimizer="default")
    assert [(move["step"], move["alive"]) for move in moves_of(trainer, "grow_rank")] == [(6, 4), (9, 5), (12, 6)]
    model = adapted(GrowRank(AverageRank(3), every=1, warmup=1, modules=2, grow_by=4))
    trainer = run(model, tmp_path / "clamped", 6, optimizer="default")
    assert [move["alive"] for move in moves_of(trainer, "grow_rank")] == [9]
    assert sorted(ranks(model)) == [1, 3, 5]


def test_a_growth_scales_the_update_by_the_ranks_alone(tmp_path):
    model, before = adapted(GrowRank(**FAST)), {}

    def look(step, model, optimizer):
        deltas = [layer.get_delta_weight("default") for layer in layers_of(model)]
        before[step] = list(zip(ranks(model), deltas, strict=True))

    def compare(step, model, optimizer):
        for layer, (rank, delta), now in zip(layers_of(model), before[step], ranks(model), strict=True):
            shrunk = delta * (rank + 1e-5) / (now + 1e-5)
            # What entered adds 1e-5 times the product of factors of a few hundredths.
            torch.testing.assert_close(layer.get_delta_weight("default"), shrunk, rtol=1e-4, atol=1e-6)

    run(
        model, tmp_path, 6, optimizer="default",
        before=[Hook(on_optimizer_step=look)],
        after=[Hook(on_step_end=compare)],
    )  # fmt: skip
    assert max(ranks(model)) > 1


@pytest.mark.parametrize("advance", [1e-5, 0.0])
def test_the_reserves_gate_is_still_and_its_factors_learn_in_advance_only(advance, tmp_path):
    model, before, learned = adapted(GrowRank(**FAST, reserve_gate=advance)), {}, []

    def look(step, model, optimizer):
        names = ("gate", "A", "B", "rank_mask")
        before[step] = [{name: held(layer, name) for name in names} for layer in layers_of(model)]

    def compare(step, model, optimizer):
        for layer, was in zip(layers_of(model), before[step], strict=True):
            rank = int(was["rank_mask"].sum())
            reserve = advance if step > 1 and sum(ranks(model)) < 9 else 0.0
            if sum(ranks(model)) == 9:
                continue
            still = rank + (1 if reserve else 0)
            assert torch.equal(held(layer, "A")[still:], was["A"][still:])
            assert torch.equal(held(layer, "B")[:, still:], was["B"][:, still:])
            assert was["gate"][rank : rank + 1].tolist() == pytest.approx([reserve])
            assert torch.equal(held(layer, "gate")[rank:], was["gate"][rank:])
            moments = optimizer.state[layer.sparse_lora_gate["default"]]
            assert not moments["exp_avg"][rank:].any()
            assert moments["exp_avg"][:rank].all()
            learned.append(not torch.equal(held(layer, "A")[rank], was["A"][rank]))

    run(
        model, tmp_path, 6, optimizer="default",
        before=[Hook(on_pre_optimizer_step=look, on_optimizer_step=compare)],
    )  # fmt: skip
    assert any(learned) == bool(advance)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_between_steps_and_at_the_end_the_adapter_is_what_lives(base, tmp_path):
    model = adapted(GrowRank(**FAST), base)

    def look(step, model, optimizer):
        for layer in layers_of(model):
            assert layer.sparse_lora_scaling["default"] == ALPHA / R
            assert not held(layer, "gate")[held(layer, "rank_mask") == 0].any()

    run(model, tmp_path / "run", 10, optimizer="default", after=[Hook(on_step_end=look)])
    deltas = [layer.get_delta_weight("default") for layer in layers_of(model)]
    found = ranks(model)
    model.base_model.compact("default")
    assert ranks(model) == found
    for layer, delta in zip(layers_of(model), deltas, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta, rtol=1e-5, atol=1e-7)


def test_a_broken_step_leaves_the_configs_scaling(tmp_path):
    model = adapted(GrowRank(**FAST))

    def stop(step, model, optimizer):
        if step == 4:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(model, tmp_path, 6, optimizer="default", after=[Hook(on_pre_optimizer_step=stop)])
    # A run that broke is cleaned up by the next one's start.
    run(model, tmp_path, 6, optimizer="default")
    assert all(layer.sparse_lora_scaling["default"] == ALPHA / R for layer in layers_of(model))


def test_a_skipped_step_and_masked_labels_change_no_score_and_no_rank(tmp_path):
    model, seen = adapted(GrowRank(**FAST)), []

    def skip(step, model, optimizer):
        optimizer._is_overflow = True  # what AcceleratedOptimizer says after GradScaler skipped

    def look(step, model, optimizer):
        seen.extend(bool(layer.rule_state("default")["sensitivity_module"].any()) for layer in layers_of(model))

    hooks = {"before": [Hook(on_optimizer_step=skip)], "after": [Hook(on_step_end=look)]}
    run(model, tmp_path / "skipped", 6, optimizer="default", **hooks)
    assert not any(seen)
    assert ranks(model) == [1, 1, 1]
    model = adapted(GrowRank(**FAST))
    with pytest.warns(UserWarning, match="the rank did not grow"):
        run(model, tmp_path / "masked", 6, optimizer="default", data=tiny.TokenData(masked=True))
    assert ranks(model) == [1, 1, 1]


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_is_the_whole_run_to_the_bit(stop, tmp_path):
    rule, whole, resumed = GrowRank(**FAST), {}, {}

    def keep(into):
        return Hook(on_step_end=lambda step, model, optimizer: into.update(all_state(model, optimizer)))

    def model():
        return adapted(copy.deepcopy(rule), rules=(Orthogonality(0.1),))

    options = {"optimizer": "default", "accumulation": 2}
    first = model()
    run(first, tmp_path / "whole", 10, after=[keep(whole)], **options)
    assert sum(ranks(first)) == 9
    run(model(), tmp_path / "parts", 10, after=[StopAt(stop)], **options)
    fresh = model()
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    resume = str(tmp_path / "parts" / f"checkpoint-{stop}")
    run(fresh, tmp_path / "parts", 10, after=[keep(resumed)], resume=resume, **options)
    assert any("sensitivity_module" in name for name in whole)
    assert differences(whole, resumed) == []


def test_what_cannot_work_is_refused_or_said(tmp_path):
    with pytest.raises(ValueError, match=r"AverageRank\.r=8 is above r=6"):
        adapted(GrowRank(AverageRank(8)))
    with pytest.raises(ValueError, match="grow_by"):
        GrowRank(grow_by=0)
    with pytest.warns(UserWarning, match="take growths up to step 8, and the run has 6"):
        run(adapted(GrowRank(every=2, warmup=2, modules=1)), tmp_path, 6, optimizer="default")


def own_clock(step: int, first: int, steps: int, warmup: int, base: float) -> float:
    """IncreLoRA's released schedule of a group that was added before update `first` (from 0)."""
    done, left = step - first, steps - first
    return base * (done / warmup if done < warmup else (left - done) / max(1, left - warmup))


RATES = {
    "own clock": (OwnClock(), lambda now, *of: own_clock(*of)),
    "constant": (ConstantRate(), lambda now, *of: of[-1]),
    "run": (RunRate(), lambda now, *of: now),
}


@pytest.mark.parametrize("rate", RATES)
def test_what_enters_starts_as_a_new_group_of_adam_with_its_own_rate(rate, tmp_path):
    rule, expected_lr = RATES[rate]
    steps, warmup, base, decay = 14, 3, 1e-2, 0.1
    model = adapted(GrowRank(**FAST, entering_lr=rule), optimizer=AgedAdamWSpec(component_ages=True))
    args = tiny.arguments(tmp_path, steps, learning_rate=base, weight_decay=decay, warmup_steps=warmup)
    seen, first, entered = {}, {}, set()

    def look(step, model, optimizer):
        t, reserve = step - 1, int(step > 1 and sum(ranks(model)) < 9)
        for number, layer in enumerate(layers_of(model)):
            rank = layer.alive_components("default")
            for name in ("gate", "A", "B"):
                parameter = getattr(layer, f"sparse_lora_{name}")["default"]
                trained = rank + (0 if name == "gate" else reserve)
                for k in range(trained):
                    if first.setdefault((number, name, k), t) == t and t:
                        entered.add((name, t))
                seen[number, name] = (parameter.detach().clone(), parameter.grad.clone(), trained)

    moments = {}

    def compare(step, model, optimizer):
        t = step - 1
        now = next(iter({group["lr"] for group in optimizer.param_groups}))
        for (number, name), (before, gradient, trained) in seen.items():
            after = held(layers_of(model)[number], name)
            axis = 1 if name == "B" else 0
            before, gradient, after = (one.double().movedim(axis, 0) for one in (before, gradient, after))
            assert torch.equal(after[trained:], before[trained:])
            for k in range(trained):
                born = first[number, name, k]
                m, v = moments.get((number, name, k), (0.0, 0.0))
                m, v = 0.9 * m + 0.1 * gradient[k], 0.999 * v + 0.001 * gradient[k] ** 2
                moments[number, name, k] = (m, v)
                age = t - born + 1
                lr = expected_lr(now, t, born, steps, warmup, base) if born else now
                adam = m / (1 - 0.9**age) / ((v / (1 - 0.999**age)).sqrt() + 1e-8)
                wanted = before[k] - lr * decay * before[k] - lr * adam
                torch.testing.assert_close(after[k], wanted, rtol=1e-5, atol=2e-7)
                if rate == "own clock" and born == t and t:
                    assert torch.equal(after[k], before[k])  # rate 0 at the first update

    options = trainer_options(model, args)
    options["callbacks"] = [Hook(on_optimizer_step=compare), *options["callbacks"], Hook(on_pre_optimizer_step=look)]
    Trainer(model=model, train_dataset=TokenData(), **options).train()
    assert sum(ranks(model)) == 9
    assert {name for name, t in entered} == {"gate", "A", "B"}
    assert len({t for _, t in entered}) > 2


def test_a_score_of_single_numbers_reads_no_dense_gradient(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a dense gradient was read")

    model = adapted(GrowRank(**FAST, score=Smoothed()))
    monkeypatch.setattr(type(layers_of(model)[0]), "add_gradient_reader", refuse)
    run(model, tmp_path, 10, optimizer="default")
    assert sum(ranks(model)) == 9


def test_a_budget_of_numbers_is_filled_as_far_as_it_goes(tmp_path):
    costs = [s.unit_numel for layer in layers_of(adapted(GrowRank())) for s in layer.unit_spaces("default")[:1]]
    numbers = 2 * sum(costs) + min(costs) - 1
    model = adapted(GrowRank(Numbers(numbers), every=1, warmup=1, modules=1))
    run(model, tmp_path, 16, optimizer="default")
    left = numbers - sum(rank * cost for rank, cost in zip(ranks(model), costs, strict=True))
    assert 0 <= left < max(costs)
    assert sum(ranks(model)) > 3
