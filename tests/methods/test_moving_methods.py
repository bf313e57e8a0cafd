"""The registered methods that move or thin out a support, against their papers: defaults, SET's two signs, the cubic
curve's published values, IST's worked update."""

import math

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import Constant, Cosine, Prune, SparseLoraConfig, callbacks_for, methods
from hf_sparse_peft.rules.sample_layers import updated_importance
from hf_sparse_peft.tuners import adapter_layers

NAMES = ("spiel-ag", "spiel-ma", "set", "rigl", "sara", "gradual-pruning", "lift")


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_layer_but_the_head_is_adapted_by_default(name):
    model = get_peft_model(tiny.llama(layers=1), methods.get(name, density=0.01).config)
    adapted = {layer.module_name.split(".")[-1] for layer in adapter_layers(model)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def supports_around_a_move(method, values_of, out, step=3, steps=5):
    """Units and values right before the move after `step`, and units right after it, by layer."""
    model = get_peft_model(tiny.llama(layers=1), method.config)
    before, after = {}, {}

    def prepare(now, model, optimizer):
        if now == step:
            for number, layer in enumerate(adapter_layers(model)):
                values = layer.sparse_lora_values["default"].data
                values.copy_(values_of(values.shape[0], torch.Generator().manual_seed(number)))
                before[layer.module_name] = (layer.units("default").tolist(), values.double().clone())

    def look(now, model, optimizer):
        if now == step:
            after.update({layer.module_name: layer.units("default").tolist() for layer in adapter_layers(model)})

    callbacks = [tiny.At(on_step_end=prepare), *method.callbacks(model), tiny.At(on_step_end=look)]
    tiny.train(model, out, steps, callbacks=callbacks, optimizer=method.optimizer)
    return before, after


def mostly_negative(count, generator):
    return torch.randn(count, generator=generator) - 1.0


def test_set_drops_the_same_share_of_the_positive_and_of_the_negative_entries(tmp_path):
    method = methods.get("set", density=0.2, every=3, fraction=0.3)
    before, after = supports_around_a_move(method, mostly_negative, tmp_path)
    for name, (units, values) in before.items():
        # Mocanu et al., 2018: the smallest positive weights and the largest negative ones, a fraction of each.
        sides = {sign: sorted((sign * v, u) for u, v in zip(units, values.tolist(), strict=True) if sign * v > 0)
                 for sign in (1, -1)}  # fmt: skip
        left = set(units) - set(after[name])
        assert len(after[name]) == len(units)
        for of_sign in sides.values():
            share = 0.3 * len(of_sign)
            smallest = {u for _, u in of_sign[: math.ceil(share)]}
            gone = left & {u for _, u in of_sign}
            assert gone <= smallest, name
            # A dropped entry may be drawn again at once; one more or less is rounding.
            assert len(gone) >= 0.55 * share - 1, name
        assert len(sides[-1]) > 3 * len(sides[1])  # one ranking of both signs would drop more of the positive ones


def test_set_by_magnitude_ranks_both_signs_together(tmp_path):
    method = methods.get("set", density=0.2, every=3, fraction=0.3, drop="magnitude")
    before, after = supports_around_a_move(method, mostly_negative, tmp_path)
    for name, (units, values) in before.items():
        smallest = {units[i] for i in values.abs().argsort()[: int(0.3 * len(units))].tolist()}
        assert set(units) - set(after[name]) <= smallest
        assert len(set(units) - set(after[name])) > 0.5 * len(smallest)


def test_set_drops_what_never_moved_before_anything_else(tmp_path):
    def half_untouched(count, generator):
        return torch.randn(count, generator=generator) * (torch.arange(count) % 2)

    method = methods.get("set", density=0.2, every=3, fraction=0.3)
    before, after = supports_around_a_move(method, half_untouched, tmp_path)
    for name, (units, values) in before.items():
        moved = {u for u, v in zip(units, values.tolist(), strict=True) if v}
        assert moved <= set(after[name])


def test_rigl_has_the_papers_defaults_and_the_released_codes_as_options():
    (paper,) = methods.get("rigl").config.schedule
    assert (paper.every, paper.fraction, paper.stop_at) == (100, Cosine(0.3, 0.0), 0.75)
    assert (paper.first_step, paper.in_place_of_update) == (100, True)
    (code,) = methods.get("rigl", fraction=0.1, first=1).config.schedule
    assert (code.curve, code.first_step) == (Constant(0.1), 1)


def test_the_cubic_curve_has_the_published_values():
    rule = Prune(final_fraction=0.2, start=0.0, end=1.0, every=10)
    sparsity = [1 - rule.living_fraction(step, 100) for step in range(0, 101, 10)]
    expected = [0, 0.2168, 0.3904, 0.5256, 0.6272, 0.7, 0.7488, 0.7784, 0.7936, 0.7992, 0.8]
    assert sparsity == pytest.approx(expected, abs=1e-12)


def test_ists_importance_moves_as_worked_out_by_hand():
    # Losses 1.0, 1.1, 1.3 of three probes at I = 0; layer 0 is in the first, layer 1 in all of them, layer 2 in none.
    updated = updated_importance([0.0, 0.0, 0.0], [[0, 1], [1], [1]], [1.0, 1.1, 1.3], 10.0)
    assert updated == pytest.approx([0.10863, 0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("favoured", [0, 3])
def test_ist_trains_and_suppresses_layers_by_their_importance(favoured, tmp_path):
    # sigma(-I) of the favoured layer is 1, of the others e^-12: it trains at every step, and is not suppressed.
    method = methods.get("ist", r=2, trained=0.25, suppressed=0.25, every=100, target_modules=["q_proj"])
    model = get_peft_model(tiny.llama(layers=4), method.config)
    (callback,) = method.callbacks(model)
    importance = [12.0] * 4
    importance[favoured] = -12.0
    drawn, suppressed = [], []

    def set_importance(step, model, optimizer):
        (run,) = callback.runs
        run.saved["importance"] = list(importance)
        run.training.step = step
        suppressed.append(run.rule._suppressed_sets(run)[0])

    first, last = (
        tiny.At(on_step_begin=set_importance),
        tiny.At(on_step_begin=lambda *_: drawn.append(callback.runs[0].memory.trained)),
    )
    tiny.train(model, tmp_path, 6, callbacks=[first, callback, last])
    assert drawn == [[favoured]] * 6
    assert [favoured] not in suppressed
    assert len(set(map(tuple, suppressed))) > 1


def test_a_probe_without_a_loss_leaves_ists_importance_alone():
    assert updated_importance([0.5, -0.5], [[0], [1]], [float("nan"), 1.0], 10.0) == [0.5, -0.5]


def test_global_pruning_compares_units_of_unequal_size_by_their_mean(tmp_path):
    # Rows of down_proj have twice the entries of q_proj's: by their sums they would all outlive q_proj's.
    pruning = Prune(final_fraction=0.5, start=0.0, end=0.5, scope="global")
    config = SparseLoraConfig(
        r=0, density=0.5, granularity="row", target_modules=["q_proj", "down_proj"], schedule=[pruning]
    )
    model = get_peft_model(tiny.llama(layers=1), config)
    layers = {layer.module_name.split(".")[-1]: layer for layer in adapter_layers(model)}
    before = {}

    def prepare(step, model, optimizer):
        if step == 3:  # the only pruning, at the window's end
            for number, (name, layer) in enumerate(layers.items()):
                values = layer.sparse_lora_values["default"].data
                values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(number)))
                values *= torch.linspace(0.1, 1, len(values))[:, None]
                before[name] = (layer.units("default").tolist(), values.double().abs().mean(1).tolist())

    callbacks = [tiny.At(on_step_end=prepare), *callbacks_for(model)]
    tiny.train(model, tmp_path, 6, callbacks=callbacks)
    ranked = sorted(
        ((m, name, u) for name, (units, means) in before.items() for u, m in zip(units, means, strict=True))
    )
    kept = ranked[len(ranked) // 2 :]
    for name, layer in layers.items():
        assert layer.units("default").tolist() == sorted(u for _, n, u in kept if n == name), name
    assert {n for _, n, _ in kept} == set(layers)
