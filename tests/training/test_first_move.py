"""What was chosen or trained is not thrown away in silence: first moves, searches and supports given from outside."""

import copy
import dataclasses
import warnings

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from hf_sparse_peft import (
    AccumulatedGradient,
    Cosine,
    Linear,
    Regrow,
    SearchSupport,
    SparseLoraConfig,
    callbacks_for,
    initialize_support,
    load_support,
    methods,
    save_support,
    write_supports,
)
from hf_sparse_peft.tuners import adapter_layers

TARGETS = ["q_proj", "down_proj"]
FIRST, STEPS, FRACTION = 3, 8, 0.2
REGROWTH = Regrow(every=10, grow=AccumulatedGradient(steps=FIRST), fraction=Linear(FRACTION, 0.0))


def adapted(base=None, **options):
    config = SparseLoraConfig(**{"r": 0, "density": 0.1, "target_modules": TARGETS, "schedule": [REGROWTH], **options})
    return get_peft_model(base or tiny.llama(layers=1), copy.deepcopy(config))


def supports(model):
    return {layer.module_name: set(layer.units("default").tolist()) for layer in adapter_layers(model)}


def batches():
    return torch.utils.data.DataLoader(tiny.TokenData(8), batch_size=4)


def left_after_first_move(model, out, **options):
    """Share of the support that the first move leaves, and what was warned of."""
    taken = {}

    def look(step, model, optimizer):
        taken[step] = supports(model)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The support is chosen by the callbacks where it waits for data: the first step sees it.
        looks = [tiny.At(on_step_begin=look), *callbacks_for(model), tiny.At(on_step_end=look)]
        tiny.train(model, out, STEPS, callbacks=looks, **options)
    before, after = taken[1], taken[STEPS]
    left = [len(before[name] & after[name]) / len(before[name]) for name in before]
    return left, [str(w.message) for w in caught if "first move" in str(w.message)]


def magnitude(out):
    return adapted(criterion="magnitude")


def from_data(out):
    return adapted(criterion={"type": "gradient", "examples": 8})


def from_data_by_hand(out):
    model = adapted(criterion={"type": "gradient", "examples": 8})
    initialize_support(model, batches(), show_progress=False)
    return model


def from_file(out):
    save_support(adapted(criterion="magnitude"), out / "support.safetensors")
    model = adapted()  # its config says criterion="random"
    load_support(model, out / "support.safetensors")
    return model


def searched(out):
    return adapted(schedule=[SearchSupport(trials=2, steps=1, batches=1), REGROWTH])


def trained_without_moves(out):
    model = adapted(schedule=[])
    tiny.train(model, out / "static", 2)
    model.peft_config["default"].schedule = [REGROWTH]
    return model


def second_run(out):
    model = adapted()
    tiny.train(model, out / "one", STEPS, callbacks=callbacks_for(model))
    return model


def interrupted(out):
    model = adapted()
    stop = tiny.At(on_step_begin=lambda step, *_: (_ for _ in ()).throw(KeyboardInterrupt) if step == 3 else None)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, out / "one", STEPS, callbacks=[*callbacks_for(model), stop])
    return model


def reloaded(out):
    second_run(out).save_pretrained(out / "saved")
    return PeftModel.from_pretrained(tiny.llama(layers=1), out / "saved", is_trainable=True)


WORTH_KEEPING = [
    magnitude, from_data, from_data_by_hand, from_file, searched, trained_without_moves, second_run, interrupted,
    reloaded,
]  # fmt: skip


@pytest.mark.parametrize("start", WORTH_KEEPING, ids=lambda start: start.__name__)
def test_spiels_first_move_keeps_a_support_that_was_chosen_or_trained_and_says_so(start, tmp_path):
    left, said = left_after_first_move(start(tmp_path), tmp_path / "run")
    assert min(left) >= 1 - FRACTION, left
    assert len(said) == 1
    assert "replace_all_first" in said[0]


@pytest.mark.parametrize("support_init", ["zeros", "uniform"])
def test_spiels_first_move_replaces_an_untrained_random_draw_without_a_word(support_init, tmp_path):
    left, said = left_after_first_move(adapted(support_init=support_init, density=0.02), tmp_path)
    assert max(left) < 0.4, left  # a candidate may be one of the random units
    assert not said


def test_the_cosine_policy_replaces_its_share_at_the_first_move(tmp_path):
    cosine = Regrow(every=10, grow=AccumulatedGradient(steps=FIRST), fraction=Cosine(FRACTION, 0.0))
    left, said = left_after_first_move(adapted(schedule=[cosine]), tmp_path)
    assert min(left) >= 1 - FRACTION
    assert not said


@pytest.mark.parametrize(("asked", "words"), [(True, "that is lost"), (False, None)])
def test_a_stated_replace_all_first_is_followed_on_a_chosen_support(asked, words, tmp_path):
    regrowth = dataclasses.replace(REGROWTH, replace_all_first=asked)
    left, said = left_after_first_move(adapted(criterion="magnitude", schedule=[regrowth], density=0.02), tmp_path)
    assert (max(left) < 0.5) is asked, left
    assert [words in one for one in said] == ([True] if asked else [])


def test_two_active_adapters_decide_each_for_itself(tmp_path):
    model = adapted(density=0.02)
    model.add_adapter("chosen", SparseLoraConfig(
        r=0, density=0.02, target_modules=TARGETS, criterion="magnitude", schedule=[REGROWTH]
    ))  # fmt: skip
    model.base_model.set_adapter(["default", "chosen"])
    layer = adapter_layers(model)[0]
    before = {name: set(layer.units(name).tolist()) for name in ("default", "chosen")}
    with pytest.warns(UserWarning, match="Adapter 'chosen': the first move") as caught:
        tiny.train(model, tmp_path, STEPS, callbacks=callbacks_for(model))
    assert sum("the first move" in str(w.message) for w in caught) == 1
    left = {name: len(units & set(layer.units(name).tolist())) / len(units) for name, units in before.items()}
    assert left["default"] < 0.5
    assert left["chosen"] >= 1 - FRACTION


@pytest.mark.parametrize("start", ["random", "trained"])
def test_a_resume_before_the_first_move_decides_as_the_run_did_at_its_start(start, tmp_path):
    # The values are trained by then: nothing in the adapter tells the two apart.
    def fresh():
        model = adapted(density=0.02)
        if start == "trained":
            for layer in adapter_layers(model):
                layer.sparse_lora_values["default"].data.fill_(0.01)
        return model

    def run(model, **options):
        callbacks = callbacks_for(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tiny.train(model, tmp_path, STEPS, callbacks=callbacks, save_strategy="steps", save_steps=2, **options)
        return callbacks[0].events, {name: p.clone() for name, p in model.state_dict().items()}

    whole, bits = run(fresh())
    resumed, again = run(fresh(), resume=str(tmp_path / "checkpoint-2"))
    assert resumed == whole
    assert (whole[0]["replaced"] > 0.5 * whole[0]["alive"]) is (start == "random")
    assert all(torch.equal(bits[name], again[name]) for name in bits)


def test_the_file_of_a_config_still_leaves_the_decision_to_the_start(tmp_path):
    adapted().save_pretrained(tmp_path)
    loaded = SparseLoraConfig.from_pretrained(tmp_path)
    assert loaded.schedule[0].replace_all_first is None
    assert loaded.schedule[0].replaces_random_start


def test_lift_says_that_it_gives_up_a_support_chosen_by_another_rule(tmp_path):
    said = {}
    for criterion in ("magnitude", "low_rank_magnitude"):
        options = {"criterion": criterion} if criterion == "magnitude" else {}
        method = methods.get("lift", density=0.05, filter_rank=2, every=3, target_modules=TARGETS, **options)
        model = get_peft_model(tiny.llama(layers=1), method.config)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tiny.train(model, tmp_path / criterion, 5, callbacks=method.callbacks(model))
        said[criterion] = [str(w.message) for w in caught if "anew" in str(w.message)]
    assert len(said["magnitude"]) == 1
    assert "criterion='low_rank_magnitude'" in said["magnitude"][0]
    assert not said["low_rank_magnitude"]


def test_units_from_outside_do_not_replace_trained_ones():
    model = adapted(schedule=[])
    layers = adapter_layers(model)
    units = {layer.module_name: layer.units("default").clone() for layer in layers}
    write_supports(model, units)  # nothing is lost yet
    layers[0].sparse_lora_values["default"].data[0] = 1.0
    with pytest.raises(ValueError, match=r"trained values in '.*q_proj'"):
        write_supports(model, units)
    assert float(layers[0].sparse_lora_values["default"][0]) == 1.0


def test_a_search_refuses_values_that_were_trained_from_a_random_start_too(tmp_path):
    search = SearchSupport(trials=2, steps=1, batches=1)
    model = adapted(schedule=[search], support_init="uniform")
    tiny.train(model, tmp_path, 1, callbacks=callbacks_for(model))  # fresh draws are no trained values
    with pytest.raises(ValueError, match="SearchSupport would put another support"):
        tiny.train(model, tmp_path, 1, callbacks=callbacks_for(model))
