"""Moves that have nothing to go by: a layer without a finite score other than 0 keeps its units and is named once."""

import warnings

import pytest
import tiny
import torch
from peft import get_peft_model
from ties import priority

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    AverageRank,
    Controller,
    Gradient,
    KernelLoraConfig,
    Linear,
    Orthogonality,
    Prune,
    Random,
    Regrow,
    SparseLoraConfig,
    callbacks_for,
    methods,
)
from hf_sparse_peft.optim import AgedAdamW, aged_adamw_groups
from hf_sparse_peft.rules import Age, Magnitude, Move, Run, Training
from hf_sparse_peft.rules.allocate import affordable
from hf_sparse_peft.rules.choosing_readers import CandidateReader, StepReader
from hf_sparse_peft.rules.drop import place_in_sign
from hf_sparse_peft.rules.frozen import move_trained_units
from hf_sparse_peft.sparsity import stream_seed
from hf_sparse_peft.tuners.shared.layer import AdapterLayer

MOVES = {
    "spiel-ag": {"schedule": [Regrow(every=4, grow=AccumulatedGradient(steps=2), replace_all_first=True)]},
    "rigl": {"schedule": [Regrow(every=3, grow=Gradient(), fraction=0.5)]},
    "rigl-accumulated": {"schedule": [Regrow(every=3, grow=Gradient(), fraction=0.5)]},
    "sensitivity": {"schedule": [Regrow(every=3, drop="sensitivity", grow=Gradient(), fraction=Linear(0.5, 0.0))]},
    "set": {"schedule": [Regrow(every=3, grow=Random(), fraction=0.5)]},
    "set-by-sign": {"schedule": [Regrow(every=3, drop="signed_magnitude", grow=Random(), fraction=Linear(0.5, 0.0))]},
    "pruning": {"schedule": [Prune(final_fraction=0.5, start=0.1, end=0.6, every=2)]},
    "pruning-global": {"schedule": [Prune(final_fraction=0.5, start=0.1, end=0.6, every=2, scope="global")]},
}


def adapted(name="spiel-ag", **options):
    options = {"density": 0.1, "target_modules": ["q_proj", "down_proj"], **MOVES.get(name, {}), **options}
    return get_peft_model(tiny.llama(), SparseLoraConfig(r=0, task_type="CAUSAL_LM", **options))


def layers(model) -> dict:
    return {m.module_name: m for m in model.modules() if isinstance(m, AdapterLayer)}


def units(model) -> dict:
    return {name: layer.units("default").tolist() for name, layer in layers(model).items()}


def unreach(model) -> set[str]:
    """Make the last transformer layer an identity; returns its adapted modules."""
    decoder = model.base_model.model.model.layers[1]
    decoder.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return {name for name in layers(model) if ".1." in name}


def told(model, out, steps=10, **options) -> list[str]:
    """Train, and return the warnings about evidence."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.train(model, out, steps, callbacks=callbacks_for(model), **options)
    return [str(w.message) for w in caught if "all 0 or not finite" in str(w.message) or "whole run" in str(w.message)]


@pytest.mark.parametrize("name", MOVES)
def test_without_any_label_no_unit_moves_and_the_run_says_so(name, tmp_path):
    model = adapted(name)
    before = units(model)
    said = told(
        model, tmp_path, data=tiny.TokenData(masked=True), gradient_accumulation_steps=1 + name.endswith("accumulated")
    )
    assert units(model) == before
    assert len(said) == 2
    assert all(layer in said[0] for layer in before)
    assert "in any of the 4 layers" in said[0]
    assert "whole run" in said[1]


@pytest.mark.parametrize("name", MOVES)
def test_a_layer_that_no_batch_reaches_keeps_its_units_and_is_named_once(name, tmp_path):
    model = adapted(name)
    before, unreached = units(model), unreach(model)
    said = told(model, tmp_path)
    for layer, kept in units(model).items():
        assert (kept == before[layer]) == (layer in unreached), layer
    assert len(said) == 1
    assert {layer for layer in before if layer in said[0]} == unreached
    if "pruning" in name:
        reached = [layer for layer in before if layer not in unreached]
        left, had = (sum(len(side[layer]) for layer in reached) for side in (units(model), before))
        assert left == pytest.approx(had / 2, abs=1)


def test_spiel_ma_keeps_its_units_without_gradients(tmp_path):
    method = methods.get("spiel-ma", density=0.1, every=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(), method.config)
    before = units(model)
    options = {"optimizer": method.optimizer, "data": tiny.TokenData(masked=True)}
    assert len(told(model, tmp_path, **options)) == 2
    assert units(model) == before


def test_values_that_are_not_finite_move_no_unit(tmp_path):
    model = adapted("set")
    before = units(model)
    for layer in layers(model).values():
        layer.sparse_lora_values["default"].data[3] = float("nan")
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    batches = torch.utils.data.DataLoader(tiny.TokenData(), batch_size=4)
    with warnings.catch_warnings(record=True) as caught, Controller(model, optimizer, 8) as rules:
        warnings.simplefilter("always")
        for _, batch in zip(range(8), batches, strict=False):
            rules.before_step()
            model(**batch).loss.backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
    assert any("all 0 or not finite" in str(one.message) for one in caught)
    assert units(model) == before
    with pytest.raises(ValueError, match=r"Step 1.*Trained values of .*q_proj"):  # which a Trainer's run looks at
        told(model, tmp_path)


def test_units_of_equal_worth_leave_from_the_whole_support():
    model = adapted("set", density=0.4)
    part = next(iter(layers(model).values())).unit_spaces("default")[0]
    part.values.data[::2] = 1.0
    drop, count = Magnitude(), part.values.numel() // 4
    worth = drop.importance(part, None)
    move = Move(part, 3, part.alive(), count, worth)
    seed = stream_seed(part.seed, "drop", 3, part.name)
    zeros = sorted(range(1, part.values.numel(), 2), key=lambda i: -priority(seed, i))
    assert move.dropped.tolist() == sorted(zeros[:count])
    assert drop.can_rank(worth, count)
    part.values.data.zero_()
    assert not drop.can_rank(drop.importance(part, None), count)
    assert drop.can_rank(drop.importance(part, None), part.values.numel())  # all leave: nothing to judge


def test_room_for_retired_units_of_equal_worth_is_drawn_for():
    regrowth = Regrow(every=3, grow=Random(), fraction=Linear(0.5, 0.0), retired=0.5)
    model = adapted(schedule=[regrowth])
    part = next(iter(layers(model).values())).unit_spaces("default")[0]
    part.layer.allocate_training_state("default")
    old = part.alive().clone()
    part.values.data[: old.numel()] = 1.0
    free = torch.tensor(sorted(set(range(1024)) - set(old.tolist())), dtype=old.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = Training(model, total_steps=9, optimizer=torch.optim.SGD([part.values], lr=0.1))
        moved = move_trained_units(Run(training, regrowth, "default", part.config, [part]), part, free[: old.numel()])
    kept = torch.isin(old, part.alive())
    assert moved.retired == int(kept.sum()) == old.numel() // 2
    quarters = [int(quarter.sum()) for quarter in kept.chunk(4)]  # of about 25 units, half expected to stay
    assert min(quarters) > 4
    assert max(quarters) < 22


def test_equal_ages_and_magnitudes_are_equally_important():
    model = adapted(schedule=[Regrow(every=3, drop="age", grow=Random())])
    part = next(iter(layers(model).values())).unit_spaces("default")[0]
    part.layer.allocate_training_state("default")
    part.values.data[:6] = torch.tensor([0.0, 2.0, 0.0, 1.0, 2.0, 0.0])
    worth = Age().importance(part, None)[:6].tolist()
    assert worth[0] == worth[2] == worth[5] < worth[3] < worth[1] == worth[4] < 1


def test_equal_magnitudes_of_one_sign_share_a_place():
    magnitude = torch.tensor([1.0, 2, 1, 3, 1, 2, 0, float("nan")])
    sums = magnitude * torch.tensor([1.0, 1, 1, 1, -1, -1, 1, 1])
    places = place_in_sign(sums, magnitude)
    assert places[:7].tolist() == [0.25, 0.625, 0.25, 0.875, 0.25, 0.75, 0.0]
    assert places[7].isnan()


def collector(kind):
    part = next(iter(layers(adapted()).values())).unit_spaces("default")[0]
    part.layer.allocate_training_state("default")
    if kind == "spiel-ag":
        return CandidateReader(part, starts=True), part
    return StepReader(part, part.count, 2, 1.0), part


@pytest.mark.parametrize("kind", ["spiel-ag", "rigl"])
def test_a_micro_batch_without_labels_does_not_choose_the_candidates(kind):
    reader, part = collector(kind)
    rows, cols = part.layer.out_features, part.layer.in_features
    dense = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
    reader(torch.zeros(rows, cols))
    assert reader.wanted_units() is None
    reader(dense.clone())
    strength = dense.abs().flatten()
    if kind == "rigl":
        strength[part.alive().long()] = -1
    best = set(strength.topk(part.count).indices.tolist())
    assert best <= set(reader.wanted_units().tolist())


class Skipping(AgedAdamW):
    """Leaves a step out where a gradient is not finite, as a gradient scaler does."""

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return super().step() if all(g.isfinite().all() for g in gradients) else None


@pytest.mark.parametrize("bad", [(), (1,), (2,), (1, 3)])
def test_grown_units_start_from_the_finite_steps_of_the_phase_alone(bad, tmp_path):
    """Moments seeded from sums over n finite steps: age n, first moment sum / n times Adam's bias correction."""
    regrowth = Regrow(every=8, grow=AccumulatedGradient(steps=4), replace_all_first=True)
    model = adapted(schedule=[regrowth], target_modules=["q_proj"])
    now, old, sums, seen = [0], {}, {}, {}

    def spoil(module, args, output):
        if now[0] in bad:
            output.loss = output.loss * float("inf")
        return output

    def before_move(step, model, optimizer):
        if step == 4:
            old.update({name: layer.units("default") for name, layer in layers(model).items()})
            for name, layer in layers(model).items():
                sums[name] = CandidateReader(layer.unit_spaces("default")[0]).sums.double().clone()

    def after_move(step, model, optimizer):
        if step == 4:
            for name, layer in layers(model).items():
                inner = getattr(optimizer, "optimizer", optimizer)
                state = inner.state[layer.sparse_lora_values["default"]]
                seen[name] = {key: state[key].double().clone() for key in ("step", "exp_avg", "exp_avg_sq")}

    model.register_forward_hook(spoil)
    hooks = [tiny.At(on_step_begin=lambda step, *_: now.__setitem__(0, step), on_step_end=before_move)]
    hooks += [*callbacks_for(model), tiny.At(on_step_end=after_move)]
    tiny.train(
        model, tmp_path, 6, callbacks=hooks, max_grad_norm=0.0,
        optimizer=lambda m, args: Skipping(aged_adamw_groups(m, lambda name, _: "sparse_lora_values" in name, 0.0)),
    )  # fmt: skip
    n = 4 - len(bad)
    for name, state in seen.items():
        new = ~torch.isin(layers(model)[name].units("default"), old[name])
        assert new.sum() > 50
        assert (state["step"][new] == n).all()
        mean, square = sums[name] / n
        torch.testing.assert_close(state["exp_avg"][new], (mean * (1 - 0.9**n))[new], rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(state["exp_avg_sq"][new], (square * (1 - 0.999**n))[new], rtol=1e-5, atol=1e-12)


def test_components_of_a_layer_without_gradients_stay_and_the_others_share_their_own_budget(tmp_path):
    allocation = Allocate(budget=AverageRank(2), initial_warmup=0.1, final_warmup=0.3, every=2)
    config = SparseLoraConfig(
        r=4,
        density=0.0,
        target_modules=["q_proj", "down_proj"],
        schedule=[allocation, Orthogonality()],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny.llama(), config)
    unreached = unreach(model)
    said = told(model, tmp_path, steps=20)
    alive = {name: int(layer.sparse_lora_rank_mask["default"].sum()) for name, layer in layers(model).items()}
    assert {alive[name] for name in unreached} == {4}
    assert sum(alive.values()) == 2 * 4 + 2 * 2
    assert len(said) == 1
    model = get_peft_model(tiny.llama(), config)
    said = told(model, tmp_path, steps=20, data=tiny.TokenData(masked=True))
    assert {int(layer.sparse_lora_rank_mask["default"].sum()) for layer in layers(model).values()} == {4}
    assert "whole run" in said[-1]


def test_equal_components_are_drawn_over_all_layers():
    config = SparseLoraConfig(r=8, density=0.0, target_modules="all-linear", schedule=[Allocate(budget=AverageRank(4))])
    model = get_peft_model(tiny.llama(), config)
    parts = list(layers(model).values())
    scores = torch.zeros(8 * len(parts))
    lives = affordable(scores, torch.ones_like(scores), 4 * len(parts), stream_seed(0, "rank allocation", 1))
    alive = lives.view(len(parts), 8).sum(1).tolist()
    assert sum(alive) == 4 * len(parts)
    assert sum(alive[: len(parts) // 2]) < 3 * len(parts)  # the first half has not got 8 each
    assert max(alive) < 8 or min(alive) > 0


def test_entries_of_a_matrix_without_gradients_stay(tmp_path):
    budget = tiny.kernel_allocation(0.8, every=2, initial_warmup=0.1, final_warmup=0.3)
    config = KernelLoraConfig(
        r=4, sparsity=0.0, target_modules=["q_proj", "down_proj"], schedule=[budget], init_weights=False
    )
    model = get_peft_model(tiny.llama(), config)
    unreached = unreach(model)
    had = {name: int(layer.kernel_lora_survivors["default"]) for name, layer in layers(model).items()}
    said = told(model, tmp_path)
    left = {name: int(layer.kernel_lora_survivors["default"]) for name, layer in layers(model).items()}
    assert all((left[name] == had[name]) == (name in unreached) for name in had)
    reached = [layer.numel for name, layer in layers(model).items() if name not in unreached]
    assert sum(left[n] for n in left if n not in unreached) == pytest.approx(0.2 * sum(reached), abs=2)
    assert len(said) == 1


@pytest.mark.parametrize("density", [0.03, 0.15])
def test_sara_on_nf4_draws_from_all_zeros_and_freezes_only_what_outgrew_a_threshold(density, tmp_path):
    options = {"density": density, "nuclear_weight": 0.0, "target_modules": ["q_proj", "down_proj"]}
    model = get_peft_model(tiny.base("nf4", hidden=64, layers=1), methods.get("sara", **options).config)
    weights = {name: layer.dense_base_weight().double().clone() for name, layer in layers(model).items()}
    for name, layer in layers(model).items():
        rows = layer.units("default").long() // layer.in_features
        assert rows.max() > 0.9 * layer.out_features
        assert rows.min() < 0.1 * layer.out_features
        assert weights[name].flatten()[layer.units("default").long()].any() == (density > 0.1)
    seen, marks = {}, {}

    def look(into, what):
        return lambda step, *_: into.update({n: what(layer).clone() for n, layer in layers(model).items() if step == 6})

    callbacks = [
        tiny.At(on_step_end=look(seen, lambda layer: layer.sparse_lora_values["default"].detach().double())),
        *callbacks_for(model),
        tiny.At(on_step_end=look(marks, lambda layer: layer.sparse_lora_rule_frozen["default"].bool())),
    ]
    tiny.train(model, tmp_path, 12, callbacks=callbacks, learning_rate=8e-3)
    for name, layer in layers(model).items():
        start = weights[name].flatten()[layer.units("default").long()]
        moved = (start + seen[name]).abs()
        beside_zero = weights[name].abs()[weights[name] != 0].min()
        expected = moved >= beside_zero if not start.any() else moved > start.abs().max()
        assert torch.equal(marks[name], expected)
        assert 0 < int(expected.sum()) < expected.numel()
