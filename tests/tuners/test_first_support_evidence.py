"""First supports from data that says nothing, or nothing about a layer, or is not finite in places."""

import warnings
from itertools import pairwise

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import Global, SparseLoraConfig, callbacks_for, initialize_support, methods
from hf_sparse_peft.tuners import adapter_layers

CRITERIA = ["gradient", "fisher", "snip", "sensitivity", "movement", "momentum", "sm3", "delta_magnitude"]
OPTIONS = {"delta_magnitude": {"warmup_steps": 4}}


def adapted(criterion="gradient", *, seed=0, options=None, **overrides):
    given = {"density": 0.1, "target_modules": ["q_proj", "down_proj"], **overrides}
    options = OPTIONS.get(criterion, {}) if options is None else options
    given = {name: value for name, value in given.items() if name != "density" or "budget" not in given}
    config = SparseLoraConfig(r=0, criterion={"type": criterion, **options}, seed=seed, task_type="CAUSAL_LM", **given)
    return get_peft_model(tiny.llama(), config)


def batches(count=4, masked=False):
    data = tiny.TokenData(samples=4 * count, masked=masked)
    stack = lambda key, at: torch.stack([data[i][key] for i in range(at, at + 4)])  # noqa: E731
    return [{key: stack(key, at) for key in ("input_ids", "labels")} for at in range(0, 4 * count, 4)]


def supports(model) -> dict:
    return {
        layer.module_name: layer.units("default").tolist()
        for layer in adapter_layers(model)
        if "default" in layer.sparse_lora_values
    }


def unreach(model) -> set[str]:
    model.base_model.model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return {layer.module_name for layer in adapter_layers(model) if ".1." in layer.module_name}


def chosen(model, data=None, **options):
    """The supports, and what was said about missing or infinite readings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        initialize_support(model, batches() if data is None else data, show_progress=False, **options)
    return supports(model), [str(w.message) for w in caught if "finite" in str(w.message)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_masked_labels_choose_nothing(criterion):
    model = adapted(criterion)
    with pytest.raises(ValueError, match=rf"criterion='{criterion}' has nothing .* all 4 modules .*masked \(-100\)"):
        initialize_support(model, batches(masked=True), show_progress=False)
    assert all(layer.awaits_calibration("default") for layer in adapter_layers(model))


def test_a_run_whose_data_has_no_labels_stops_before_its_first_step(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="nothing to choose a support by"):
        tiny.train(model, tmp_path, 2, callbacks=callbacks_for(model), data=tiny.TokenData(masked=True))


@pytest.mark.parametrize("criterion", [*CRITERIA, "activation"])
def test_a_layer_that_no_batch_reaches_gets_random_units_and_is_named(criterion):
    whole = {"granularity": "row", "density": 0.5} if criterion == "activation" else {}
    plain, _ = chosen(adapted(criterion, **whole))
    found = []
    for seed in (0, 0, 1):
        model = adapted(criterion, seed=seed, **whole)
        unreached = unreach(model)
        units, said = chosen(model)
        assert len(said) == 1
        assert {name for name in units if name in said[0]} == unreached
        assert all(len(units[name]) == len(plain[name]) for name in units)
        found.append(units)
    for name in unreached:
        assert found[0][name] == found[1][name] != found[2][name]
        layer = next(layer for layer in adapter_layers(model) if layer.module_name == name)
        grid = layer.sparse_lora_grid["default"]
        assert found[0][name] != list(range(len(found[0][name])))
        assert max(found[0][name]) > 0.8 * grid.num_units
    assert all(found[0][name] == found[2][name] for name in set(plain) - unreached)


def test_a_global_budget_goes_to_the_layers_that_data_reaches():
    model = adapted(budget=Global(0.1))
    unreached = unreach(model)
    units, said = chosen(model)
    total = sum(layer.sparse_lora_grid["default"].num_units for layer in adapter_layers(model))
    assert set(units) == {layer.module_name for layer in adapter_layers(model)} - unreached
    assert sum(map(len, units.values())) == int(0.1 * total)
    assert "none of the shared budget" in said[0]
    assert {n: tiny.units_of_sizes(model.peft_config["default"])[n] for n in unreached} == dict.fromkeys(unreached, 0)


@pytest.mark.parametrize("criterion", ["gradient", "fisher", "sm3", "momentum"])
def test_a_reading_that_is_not_finite_is_left_out_of_the_estimate(criterion):
    """With one bad batch among four the support is the one of the other three."""
    data = batches()
    calls = []

    def loss(model, batch):
        calls.append(1)
        bad = torch.equal(batch["input_ids"][0], data[1]["input_ids"][0])
        return model(**batch).loss * (float("inf") if bad else 1.0)

    per_example = {"examples": 16}
    expected, _ = chosen(adapted(criterion, options=per_example), [data[0], data[2], data[3]])
    found, said = chosen(adapted(criterion, options=per_example), data, compute_loss=loss)
    if criterion == "fisher":  # one example at a time: three of the bad batch's four are fine
        kept = [{key: value[1:] for key, value in data[1].items()}]
        expected, _ = chosen(adapted(criterion, options=per_example), [data[0], *kept, data[2], data[3]])
    assert found == expected
    assert len(said) == 1
    assert "leaves out" in said[0]
    assert len(calls) >= 4


def test_one_step_that_is_not_finite_changes_nothing_in_a_dense_warm_up():
    seen = []

    def loss(model, batch):
        seen.append([layer.sparse_lora_dense_delta["default"].detach().clone() for layer in adapter_layers(model)])
        return model(**batch).loss * (float("nan") if len(seen) == 2 else 1.0)

    found, said = chosen(adapted("delta_magnitude"), compute_loss=loss)
    assert "Dense warm-up: 1 of 4 steps" in said[0]
    assert all(map(len, found.values()))
    changed = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(seen)]
    assert changed == [True, False, True]  # between the starts of steps 1 and 2, 2 and 3, 3 and 4


def test_equal_structures_are_drawn_over_all_of_them():
    found = []
    for seed in (0, 0, 1):
        base = tiny.llama(layers=2)
        for parameter in base.parameters():
            parameter.data.fill_(0.1)
        options = {"down": 0.25, "criterion": "magnitude", "target_modules": ["down_proj"]}
        found.append(supports(get_peft_model(base, methods.get("s2ft", seed=seed, **options).config)))
    assert found[0] == found[1] != found[2]
    first, second = found[0].values()
    assert len(first) + len(second) == 32
    assert min(len(first), len(second)) > 6  # 16 expected, standard deviation 2.5
    assert max(first) > 48
