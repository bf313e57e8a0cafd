"""`pattern=Grid(...)` from injection to the end of a run: criteria, growths, budgets, files, resume, NF4."""

import json

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from training_toolbox import (
    Hook,
    StopAt,
    TokenData,
    adapted,
    all_state,
    differences,
    layers_of,
    make_config,
    run,
    tiny_llama,
)

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    Global,
    Gradient,
    Grid,
    LowRankMagnitude,
    Numbers,
    Prune,
    Random,
    RandomUnfired,
    Regrow,
    SearchSupport,
    SparseLoraConfig,
    SparseSM3Spec,
    callbacks_for,
    initialize_support,
    make_optimizer,
)
from hf_sparse_peft.rules import SM3, ChooseSupport
from hf_sparse_peft.sparsity import select_units

GRID = Grid(0.25, 0.25)
BATCHES = [{name: one[None] for name, one in TokenData()[i].items()} for i in range(6)]


def live(layer) -> tuple[int, int, int]:
    units = layer.units("default").long()
    return units.numel(), (units // layer.in_features).unique().numel(), (units % layer.in_features).unique().numel()


def check(model, count=lambda layer: int(0.05 * layer.in_features * layer.out_features)) -> None:
    for layer in layers_of(model):
        number, rows, columns = live(layer)
        assert number == count(layer)
        assert rows <= -(-layer.out_features // 4)
        assert columns <= -(-layer.in_features // 4)


@pytest.mark.parametrize("criterion", ["gradient", "fisher", "snip", "sensitivity", "movement", "sm3", "momentum"])
def test_criteria_by_data_choose_the_best_grid_of_their_score(criterion):
    model = adapted(make_config(criterion=criterion, pattern=GRID))
    free = adapted(make_config(criterion=criterion))
    whole = adapted(make_config(criterion=criterion, pattern=Grid(1, 1)))
    for one in (model, free, whole):
        initialize_support(one, BATCHES, max_examples=4, show_progress=False)
    check(model)
    for a, b, c in zip(layers_of(model), layers_of(free), layers_of(whole), strict=True):
        assert torch.equal(b.units("default"), c.units("default"))
        assert not torch.equal(a.units("default"), b.units("default"))


def test_a_layer_at_a_time_chooses_what_all_at_once_do():
    found = []
    for limit in (1 << 30, 1):
        model = adapted(make_config(criterion="fisher", pattern=GRID))
        initialize_support(model, BATCHES, max_examples=4, show_progress=False, accumulator_bytes=limit)
        found.append([layer.units("default") for layer in layers_of(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_iterations_of_a_dense_warmup_stay_in_one_grid():
    criterion = {"type": "delta_magnitude", "warmup_steps": 2, "n_iterations": 2, "warmup_lr": 1e-2}
    model = adapted(make_config(criterion=criterion, pattern=GRID))
    initialize_support(model, BATCHES, show_progress=False)
    check(model)


@pytest.mark.parametrize("budget", [Numbers(120), Global(0.04), Global(0.06)])
@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
def test_budgets_over_the_model_stay_inside(budget, criterion):
    model = adapted(make_config(criterion=criterion, pattern=GRID, budget=budget))
    if criterion == "gradient":
        initialize_support(model, BATCHES, max_examples=4, show_progress=False)
    check(model, lambda layer: layer.sizes["default"].units)
    total = sum(live(layer)[0] for layer in layers_of(model))
    entries = sum(layer.in_features * layer.out_features for layer in layers_of(model))
    wanted = 120 if isinstance(budget, Numbers) else budget.total.fraction * entries
    assert abs(total - wanted) <= len(layers_of(model))


GROWTHS = {
    "spiel": (AccumulatedGradient(steps=2), "aged", {}),
    "spiel kept": (AccumulatedGradient(steps=2), "aged", {"replace_all_first": False}),
    "rigl": (Gradient(), "aged", {"in_place_of_update": True}),
    "rigl candidates": (Gradient(candidates=2.0), "aged", {"drop": "sensitivity"}),
    "set": (Random(), "aged", {"drop": "signed_magnitude"}),
    "unfired": (RandomUnfired(), "aged", {"drop": "age"}),
    "low rank": (LowRankMagnitude(rank=4), "aged", {}),
    "lift": (LowRankMagnitude(rank=4), "aged", {"drop": None}),
}


@pytest.mark.parametrize("case", GROWTHS)
def test_moves_stay_inside_a_grid_that_moves(case, tmp_path):
    grow, optimizer, options = GROWTHS[case]
    rule = Regrow(every=3, grow=grow, **{"fraction": 0.4, **options})
    model = adapted(make_config(pattern=GRID, schedule=[rule]))
    check(model)
    before = [layer.units("default").long() for layer in layers_of(model)]
    moved = []

    def look(update, model, optimizer):
        check(model)
        moved.append([layer.units("default").long() for layer in layers_of(model)])

    run(model, tmp_path, 10, after=[Hook(on_step_end=look)], accumulation=2, batch=2, optimizer=optimizer)
    check(model)
    for layer, old in zip(layers_of(model), before, strict=True):
        new = layer.units("default").long()
        rows = [set((units // layer.in_features).tolist()) for units in (old, new)]
        columns = [set((units % layer.in_features).tolist()) for units in (old, new)]
        assert rows[0] != rows[1] or columns[0] != columns[1]


def test_sm3_grows_inside_of_a_grid(tmp_path):
    rule = Regrow(every=3, grow=SM3(), fraction=0.4)
    model = adapted(make_config(density=0.02, pattern=GRID, schedule=[rule], optimizer=SparseSM3Spec()))
    before = [layer.units("default") for layer in layers_of(model)]
    tiny.train(model, tmp_path, 8, callbacks=callbacks_for(model), optimizer=make_optimizer, data=TokenData())
    check(model, lambda layer: int(0.02 * layer.in_features * layer.out_features))
    assert not any(torch.equal(a, b.units("default")) for a, b in zip(before, layers_of(model), strict=True))


def test_pruning_inside_of_moves_and_a_joint_budget_stay_inside(tmp_path):
    moves = [Regrow(every=3, grow=Gradient(), fraction=0.4), Prune(0.5, start=0.0, end=0.8, every=3)]
    model = adapted(make_config(pattern=GRID, schedule=moves))
    run(model, tmp_path / "prune", 10, batch=2)
    check(model, lambda layer: max(1, round(0.5 * int(0.05 * layer.in_features * layer.out_features))))
    joint = Allocate(["rank", "support"], budget=Numbers(100), every=2, initial_warmup=0.0)
    model = adapted(make_config(r=4, pattern=GRID, schedule=[joint]))
    run(model, tmp_path / "joint", 10, batch=2)
    check(model, lambda layer: live(layer)[0])
    assert sum(live(layer)[0] for layer in layers_of(model)) < sum(
        layer.sizes["default"].units for layer in layers_of(model)
    )


def test_a_support_chosen_after_a_warmup_lies_in_a_grid(tmp_path):
    model = adapted(make_config(r=2, pattern=GRID, schedule=[ChooseSupport(warmup=2, steps=1)]))
    before = [layer.units("default") for layer in layers_of(model)]
    run(model, tmp_path, 5, batch=2)
    check(model)
    assert not any(torch.equal(a, b.units("default")) for a, b in zip(before, layers_of(model), strict=True))


def test_searched_supports_lie_in_grids_of_their_own(tmp_path):
    model = adapted(make_config(pattern=GRID, schedule=[SearchSupport(trials=3, steps=1, batches=1)]))
    run(model, tmp_path, 2, batch=2)
    check(model)


def last_state(model, out, **options):
    found = {}

    def look(update, model, optimizer):
        if update == 12:
            found.update(all_state(model, optimizer))

    run(model, out, 12, after=[Hook(on_step_end=look)], batch=2, accumulation=2, **options)
    return found


@pytest.mark.parametrize(("base", "stop"), [("fp32", 5), pytest.param("fp32", 6, marks=pytest.mark.slow), ("nf4", 6)])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(base, stop, tmp_path):
    # Candidates are chosen at steps 5 and 9: one stop lies between a choice and its move, one right after the move.
    rules = [Regrow(every=4, first=6, grow=AccumulatedGradient(steps=2), fraction=0.4), Prune(0.7, every=4)]
    config = make_config(criterion="fisher", pattern=GRID, schedule=rules)

    def model():
        return adapted(config, base=tiny.base(base) if base == "nf4" else tiny_llama())

    whole = last_state(model(), tmp_path / "whole")
    run(model(), tmp_path / "parts", 12, after=[StopAt(stop)], batch=2, accumulation=2)
    resumed = last_state(model(), tmp_path / "parts", resume=str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert len(whole) > 10
    assert differences(whole, resumed) == []


def test_a_saved_adapter_keeps_its_pattern_and_a_file_outside_of_it_is_refused(tmp_path):
    model = adapted(make_config(criterion="magnitude", pattern=GRID))
    model.save_pretrained(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["pattern"] == {"type": "grid"}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    check(loaded)
    assert loaded.peft_config["default"].pattern == GRID
    options["pattern"] = {"type": "grid", "rows": 0.05, "columns": 0.9}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(ValueError, match="sparse_lora_support' lie in"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_pattern_of_a_plugin_loads_for_inference_is_kept_and_refuses_to_train(tmp_path):
    adapted(make_config(criterion="magnitude")).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    options["pattern"] = {"type": "two_of_four"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert loaded.peft_config["default"].to_dict()["pattern"] == {"type": "two_of_four"}
    with pytest.raises(ValueError, match="two_of_four"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True).train()(**BATCHES[0])


REFUSED = {
    "given": ({"criterion": "given"}, "criterion='given' takes them from outside"),
    "subnet": ({"granularity": "subnet"}, "granularity='subnet'"),
    "nothing": ({"r": 4, "density": 0.0}, "density=0"),
    "retired": ({"schedule": [Regrow(retired=0.5)]}, "Regrow.retired"),
    "structures": ({"structures": [{"modules": ["q_proj"]}], "granularity": "row"}, "structures"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_choose_units_otherwise_is_refused_in_a_sentence(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"pattern=Grid.*{message}"):
        make_config(pattern=GRID, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"granularity": "row"}, "granularity 'row'"), ({"density": 0.1}, "has 64 places.*wants 102")],
)
def test_a_weight_that_the_grid_does_not_fit_is_refused_by_name_before_a_layer_changes(options, message):
    base = tiny_llama()
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, make_config(pattern=GRID, **options))
    assert [type(module) for module in base.modules()] == before


def test_one_config_serves_two_models_and_injection_chooses_as_the_selection_does():
    config = SparseLoraConfig(r=0, density=0.05, criterion="magnitude", pattern="grid", target_modules=["q_proj"])
    for seed in (0, 1):
        layer = layers_of(adapted(config, seed=seed))[0]
        weight, grid = layer.dense_base_weight(), layer.sparse_lora_grid["default"]
        own = select_units("magnitude", weight, grid, 51, generator=None, pattern=GRID)
        assert torch.equal(layer.units("default"), own)


def test_combined_adapters_keep_to_no_pattern():
    config = make_config(criterion="magnitude", pattern=GRID)
    model = adapted(config)
    model.add_adapter("other", make_config(criterion="smallest_magnitude", pattern=GRID))
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
    assert model.peft_config["both"].pattern is None
