"""A schedule that nobody carries out says so once; what cannot run is refused with the mend."""

import warnings

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_toolbox import adapted, make_config, run, tiny_llama

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    AverageRank,
    MaskRegrowthCallback,
    Prune,
    PruningCallback,
    RankReallocationCallback,
    Regrow,
    callbacks_for,
)
from hf_sparse_peft.optim import use_32bit_states
from hf_sparse_peft.training import RuleRunner

IDS = torch.arange(18).view(2, 9)
SCHEDULES = {
    "regrow": (MaskRegrowthCallback, {"schedule": [Regrow(every=4, grow=AccumulatedGradient(steps=2))]}),
    "prune": (PruningCallback, {"schedule": [Prune(interval=2)]}),
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
