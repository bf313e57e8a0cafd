"""A schedule that nobody carries out says so once; what cannot run is refused with the mend."""

import warnings

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_toolbox import TokenData, adapted, layers_of, make_config, run, tiny_llama
from transformers import Trainer, TrainingArguments

from hf_sparse_peft import (
    AccumulatedGradient,
    AgedAdamWSpec,
    Allocate,
    AverageRank,
    Controller,
    Freeze,
    GrowRank,
    MaskRegrowthCallback,
    Prune,
    PruningCallback,
    RankReallocationCallback,
    Regrow,
    SparseSM3Spec,
    ZerothOrderSpec,
    callbacks_for,
    make_optimizer,
    trainer_options,
)
from hf_sparse_peft.optim import use_32bit_states
from hf_sparse_peft.training import RuleRunner

IDS = torch.arange(18).view(2, 9)
SCHEDULES = {
    "regrow": (MaskRegrowthCallback, {"schedule": [Regrow(every=4, grow=AccumulatedGradient(steps=2))]}),
    "prune": (PruningCallback, {"schedule": [Prune(every=2)]}),
    "allocate": (
        RankReallocationCallback,
        {"r": 4, "density": 0.0, "schedule": [Allocate(budget=AverageRank(2), every=2)]},
    ),
}
NAMED = {"prune": "Prune", "regrow": "AccumulatedGradient.steps", "allocate": "Allocate"}
ALL = {
    "r": 4, "schedule": [rule for _, options in SCHEDULES.values() for rule in options["schedule"]],
}  # fmt: skip


def train_steps(model, steps: int = 3) -> list[str]:
    """Plain training steps; returns the warnings about schedules."""
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(input_ids=IDS, labels=IDS).loss.backward()
    return [str(w.message) for w in caught if "asks for" in str(w.message)]


@pytest.mark.parametrize("option", SCHEDULES)
def test_training_without_the_callback_warns_once_and_names_the_mend(option):
    (message,) = train_steps(adapted(make_config(**SCHEDULES[option][1])))
    assert option in message
    assert "callbacks=hf_sparse_peft.callbacks_for(model)" in message
    assert "schedule=[]" in message


def test_several_schedules_are_named_in_one_warning():
    (message,) = train_steps(adapted(make_config(**ALL)))
    assert all(option in message for option in SCHEDULES)


def test_no_warning_without_a_schedule_in_eval_or_without_gradients():
    assert train_steps(adapted(make_config())) == []
    model = adapted(make_config(**ALL))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
        model(input_ids=IDS)
        model.train()
        with torch.no_grad():
            model(input_ids=IDS)


def test_no_warning_with_the_callbacks_nor_after_the_end(tmp_path):
    model = adapted(make_config(**ALL))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, tmp_path, 8)
    assert [w for w in caught if "asks for" in str(w.message)] == []
    assert model.peft_config["default"].training_finished
    assert train_steps(model) == []


def test_callbacks_for_picks_what_the_config_asks_for_in_the_order_they_must_act():
    expected = [RuleRunner]
    config = make_config(**ALL)
    assert [type(c) for c in callbacks_for(config)] == expected
    assert [type(c) for c in callbacks_for(adapted(config))] == expected
    assert callbacks_for(make_config()) == []
    for _, options in SCHEDULES.values():
        assert [type(c) for c in callbacks_for(make_config(**options))] == expected


@pytest.mark.parametrize("wrong", [None, "config", LoraConfig(), torch.nn.Linear(2, 2)], ids=lambda w: type(w).__name__)
def test_callbacks_for_refuses_what_has_no_schedule_to_read(wrong):
    with pytest.raises(TypeError, match=f"not {type(wrong).__name__}"):
        callbacks_for(wrong)


TOO_SHORT = {
    "regrow": ({"schedule": [Regrow(every=20, grow=AccumulatedGradient(steps=6))]}, 6, "=6"),
    "prune": ({"schedule": [Prune(start=0.5, end=0.51)]}, 10, "leave no step in a run of 10"),
    "allocate": (
        {"r": 4, "schedule": [Allocate(budget=AverageRank(2), every=50, fixed_at_end=False)]},
        10,
        "every=50 is longer than the run of 10",
    ),
}


@pytest.mark.parametrize("option", TOO_SHORT)
def test_a_schedule_that_does_not_fit_the_run_is_refused_before_the_first_step(option, tmp_path):
    options, steps, message = TOO_SHORT[option]
    model = adapted(make_config(**options))
    with pytest.raises(ValueError, match=f"{NAMED.get(option, option)}.*{message}.*[Tt]rain longer"):
        run(model, tmp_path, steps)


@pytest.mark.parametrize("option", SCHEDULES)
def test_a_callback_without_any_adapter_that_asks_for_it_is_refused(option, tmp_path):
    callback = SCHEDULES[option][0]
    mend = "Set schedule"
    with pytest.raises(ValueError, match=f"{callback.__name__} found no trained adapter.*{mend}"):
        run(adapted(make_config(r=2)), tmp_path, 8, callbacks=[callback()])
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=mend):
        run(lora, tmp_path, 8, callbacks=[callback()], optimizer="default")


def test_a_frozen_adapter_is_not_scheduled(tmp_path):
    model = adapted(make_config(r=2, schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))]))
    for name, parameter in model.named_parameters():
        if "sparse_lora_values" in name:
            parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="found no trained adapter"):
        run(model, tmp_path, 8, optimizer="default")


def test_a_frozen_adapter_that_has_a_schedule_is_not_told_to_set_one(tmp_path):
    model = adapted(make_config(schedule=[Prune(every=2)]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for begin in (lambda: Controller(model, optimizer, 8), lambda: run(model, tmp_path, 8, optimizer="default")):
        with pytest.raises(ValueError, match=r"'default' has, and requires_grad is False.*set_adapter\('default'\)"):
            begin()


# Rules that callbacks were given, beside the config's


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"schedule": [Freeze(at=0.5)]}, Prune(every=2), "Prune moves them|Prune takes units away"),
        ({"schedule": [Prune(every=2)]}, Freeze(at=0.5), "Freeze needs the units.*Prune moves them"),
        ({"r": 4, "schedule": [Allocate(budget=AverageRank(2), every=2)]}, GrowRank(), "both decide which units"),
    ],
    ids=["prune+freeze", "freeze+prune", "grow+allocate"],
)
def test_a_given_rule_is_checked_against_the_configs_rules(options, given, message, order, tmp_path):
    callbacks = [RuleRunner(given), RuleRunner()][::order]
    with pytest.raises(ValueError, match=message):
        run(adapted(make_config(**options)), tmp_path, 8, callbacks=callbacks)


def test_two_given_rules_are_checked_against_each_other(tmp_path):
    callbacks = [RuleRunner(Freeze(at=0.5)), PruningCallback(Prune(every=2))]
    with pytest.raises(ValueError, match=r"Freeze needs the units.*Prune moves them"):
        run(adapted(make_config()), tmp_path, 8, callbacks=callbacks)


def test_a_given_rule_is_checked_against_the_config(tmp_path):
    model = adapted(make_config(granularity="row", density=0.2))
    with pytest.raises(ValueError, match=r"Freeze looks at single entries.*granularity='row'"):
        run(model, tmp_path, 8, callbacks=[RuleRunner(Freeze(at=0.5))])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"Freeze looks at single entries.*granularity='row'"):
        Controller(model, optimizer, 8, rule=Freeze(at=0.5))


def test_a_given_rule_is_not_checked_against_rules_that_have_ended(tmp_path):
    model = adapted(make_config(r=4, schedule=[GrowRank(AverageRank(4), every=1, warmup=0, modules=9)]))
    run(model, tmp_path, 8)
    assert model.peft_config["default"].training_finished
    run(model, tmp_path, 8, callbacks=[RankReallocationCallback(Allocate(budget=AverageRank(2), every=2))])
    assert sum(layer.alive_components("default") for layer in layers_of(model)) == 2 * len(layers_of(model))


# The config's optimizer


def optimizer_warnings(make) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(w.message) for w in caught if "asks for optimizer" in str(w.message)]


@pytest.mark.parametrize("schedule", [[], [Prune(every=2)]], ids=["no rule", "prune"])
@pytest.mark.parametrize("spec", [AgedAdamWSpec(), SparseSM3Spec(), ZerothOrderSpec()], ids=lambda spec: spec.part_type)
def test_a_trainer_without_the_configs_optimizer_says_so_once_a_run(spec, schedule, tmp_path):
    model = adapted(make_config(optimizer=spec, schedule=schedule))
    for _ in range(2):
        (message,) = optimizer_warnings(lambda: run(model, tmp_path, 4, optimizer="default"))
        assert type(spec).__name__ in message
        assert "the run has AdamW" in message
        assert "trainer_options(model, args)" in message
    config_alone = callbacks_for(make_config(optimizer=spec, schedule=schedule))
    assert len(optimizer_warnings(lambda: run(model, tmp_path, 4, callbacks=config_alone, optimizer="default"))) == 1


def test_a_run_with_the_configs_optimizer_says_nothing_of_it(tmp_path):
    model = adapted(make_config(optimizer=AgedAdamWSpec(), schedule=[Prune(every=2)]))
    args = TrainingArguments(str(tmp_path), max_steps=4, save_strategy="no", report_to=[], use_cpu=True)
    trained = Trainer(model, train_dataset=TokenData(), **trainer_options(model, args))
    assert optimizer_warnings(trained.train) == []
    assert optimizer_warnings(lambda: Controller(model, make_optimizer(model, lr=1e-2), 4).close()) == []


def test_a_controller_with_another_optimizer_than_the_configs_says_so():
    model = adapted(make_config(optimizer=SparseSM3Spec()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (message,) = optimizer_warnings(lambda: Controller(model, optimizer, 4).close())
    assert "SparseSM3Spec" in message
    assert "the run has SGD" in message
    assert "make_optimizer(model, lr=...)" in message


def test_eight_bit_optimizer_state_is_refused_with_the_mend_and_the_mend_works(tmp_path):
    # bitsandbytes keeps tensors of less than 4096 elements in 32 bits, so the support must be larger.
    config = make_config(
        density=0.6, target_modules=["down_proj"], schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))]
    )

    def trainer(out, mend):
        model = adapted(config, hidden=64)
        values = [p for name, p in model.named_parameters() if "sparse_lora_values" in name]
        assert min(p.numel() for p in values) >= 4096
        if mend:
            use_32bit_states(values)
        made = run(model, out, 4, train=False, optimizer="default")
        made.optimizer = bnb.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        return made

    with pytest.raises(ValueError, match=r"8-bit.*use_32bit_states"):
        trainer(tmp_path / "refused", mend=False).train()
    mended = trainer(tmp_path / "mended", mend=True)
    mended.train()
    assert mended.schedule_callbacks[0].events[0]["replaced"] > 0


def test_adafactor_and_sgd_move_supports_too(tmp_path):
    for name in ("adafactor", "sgd"):
        model = adapted(make_config(schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))]))
        trainer = run(model, tmp_path / name, 8, optimizer="default", optim=name)
        assert [move["step"] for move in trainer.schedule_callbacks[0].events] == [2, 6]
        assert trainer.schedule_callbacks[0].events[0]["replaced"] > 0


@pytest.mark.parametrize("every", [0, -3])
def test_telemetry_refuses_a_period_below_one(every):
    from hf_sparse_peft import SupportTelemetryCallback

    with pytest.raises(ValueError, match=f"every={every}"):
        SupportTelemetryCallback(every=every)
