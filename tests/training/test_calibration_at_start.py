"""Supports that the Trainer's own data chooses at the start of training."""

from types import SimpleNamespace

import pytest
import torch
from training_toolbox import StopAt, TokenData, adapted, all_state, differences, layers_of, make_config, run, support_of
from transformers import TrainerCallback

from hf_sparse_peft import (
    AccumulatedGradient,
    Controller,
    Density,
    Global,
    MaskRegrowthCallback,
    Regrow,
    StructureConfig,
    callbacks_for,
    initialize_support,
)
from hf_sparse_peft.rules import Training
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.training.calibration import calibrate_waiting, start

WARMUP = {"warmup_steps": 3, "warmup_lr": 1e-3}


def by_data(criterion="fisher", options=None, **overrides):
    options = options or (WARMUP if criterion == "delta_magnitude" else {"examples": 10})
    return make_config(criterion={"type": criterion, **options}, **overrides)


def supports(model):
    return {layer.module_name: support_of(layer) for layer in layers_of(model)}


class Batches(TrainerCallback):
    """The order in which training sees its data, and the states of its random generators at every step."""

    def __init__(self):
        self.seen, self.states = [], []

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self.sampler = train_dataloader.batch_sampler.sampler
        self.handle = model.register_forward_pre_hook(self.see, with_kwargs=True)
        self.states.append(torch.get_rng_state())

    def see(self, module, args, kwargs):
        self.seen.append(kwargs["input_ids"].clone())

    def on_step_end(self, args, state, control, **kwargs):
        generator = getattr(self.sampler, "generator", None)
        self.states.append(torch.get_rng_state())
        self.states.append(generator.get_state() if generator is not None else torch.zeros(1))


@pytest.mark.parametrize("criterion", ["fisher", "delta_magnitude"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_sees_the_batches_it_would_have_seen_without_calibration(criterion, workers, tmp_path):
    tapes = []
    for config in (by_data(criterion), make_config()):
        model, tape = adapted(config), Batches()
        callbacks = callbacks_for(model)
        assert bool(callbacks) is config.needs_calibration
        run(model, tmp_path, 30, callbacks=[*callbacks, tape], data=TokenData(20), dataloader_num_workers=workers)
        tapes.append(tape)
    with_it, without = tapes
    assert len(with_it.seen) == 30  # 6 epochs of 5 batches
    assert all(torch.equal(one, two) for one, two in zip(with_it.seen, without.seen, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(with_it.states, without.states, strict=True))
    assert not torch.equal(torch.cat(with_it.seen[:5]), torch.cat(with_it.seen[5:10]))  # the order is a shuffled one


def test_the_runner_chooses_from_the_first_batches_of_training(tmp_path):
    model, tape = adapted(by_data(options={"examples": 8})), Batches()
    run(model, tmp_path, 3, callbacks=[*callbacks_for(model), tape])
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in tape.seen]
    by_hand = adapted(by_data(options={"examples": 8}))
    initialize_support(by_hand, data, show_progress=False)
    assert supports(model) == supports(by_hand)
    assert any(layer.sparse_lora_values["default"].any() for layer in layers_of(model))


@pytest.mark.parametrize("criterion", ["gradient", "fisher", "sensitivity", "delta_magnitude"])
def test_gradient_accumulation_does_not_change_what_is_chosen(criterion, tmp_path):
    options = WARMUP if criterion == "delta_magnitude" else {"examples": 12}
    found = []
    for batch, accumulation in ((4, 1), (2, 2)):
        model = adapted(by_data(criterion, options))
        run(model, tmp_path, 1, batch=batch, accumulation=accumulation)
        found.append(supports(model))
    one, two = found
    shared = sum(len(set(one[name]) & set(two[name])) for name in one)
    assert shared >= 0.99 * sum(map(len, one.values()))


@pytest.mark.parametrize("budget", [Density(0.05), Global(0.05)], ids=["uniform", "global"])
@pytest.mark.parametrize("criterion", ["fisher", "delta_magnitude"])
def test_a_resumed_run_takes_its_supports_from_the_checkpoint(criterion, budget, tmp_path, monkeypatch):
    config = by_data(criterion, budget=budget, schedule=[Regrow(every=4, grow=AccumulatedGradient(steps=2))])
    whole = adapted(config)
    trainer = run(whole, tmp_path / "whole", 12)
    expected = all_state(whole, trainer.optimizer)
    run(adapted(config), tmp_path / "parts", 12, after=[StopAt(6)])
    monkeypatch.setattr(start, "calibrate", lambda *args, **kwargs: pytest.fail("chosen again"))
    resumed = adapted(config)
    trainer = run(resumed, tmp_path / "parts", 12, resume=str(tmp_path / "parts" / "checkpoint-6"))
    assert differences(expected, all_state(resumed, trainer.optimizer)) == []
    assert resumed.peft_config["default"].sizes == whole.peft_config["default"].sizes


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("criterion", ["activation", "gradient"])
def test_structures_are_chosen_at_the_start_and_a_resumed_run_keeps_them(criterion, scope, tmp_path, monkeypatch):
    config = by_data(
        criterion, {"examples": 8, "largest": False}, density=0.0, target_modules=["down_proj"],
        granularity="column", structures=[StructureConfig(["down_proj"], density=0.1, scope=scope)],
    )  # fmt: skip
    whole, tape = adapted(config, layers=2), Batches()
    trainer = run(whole, tmp_path / "whole", 6, callbacks=[*callbacks_for(whole), tape])
    expected = all_state(whole, trainer.optimizer)
    by_hand = adapted(config, layers=2)
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in tape.seen]
    initialize_support(by_hand, data, show_progress=False)
    assert supports(whole) == supports(by_hand)
    run(adapted(config, layers=2), tmp_path / "parts", 6, after=[StopAt(3)])
    monkeypatch.setattr(start, "calibrate", lambda *args, **kwargs: pytest.fail("chosen again"))
    resumed = adapted(config, layers=2)
    trainer = run(resumed, tmp_path / "parts", 6, resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert differences(expected, all_state(resumed, trainer.optimizer)) == []


def test_training_with_neither_call_nor_callback_is_an_error_that_shows_both(tmp_path):
    with pytest.raises(ValueError, match=r"initialize_support\(model, dataloader\).*callbacks_for\(model\)"):
        run(adapted(by_data()), tmp_path, 2, callbacks=[])


def test_one_runner_is_given_where_a_support_waits_for_data():
    assert [type(callback) for callback in callbacks_for(by_data())] == [RuleRunner]
    model = adapted(by_data(schedule=[Regrow()]))
    assert [type(callback) for callback in callbacks_for(model)] == [RuleRunner]
    model = adapted(by_data())
    assert [type(callback) for callback in callbacks_for(model)] == [RuleRunner]
    ids = torch.randint(48, (2, 8))
    initialize_support(model, [{"input_ids": ids, "labels": ids}], show_progress=False)
    assert callbacks_for(model) == []


def test_a_runner_without_rules_has_nothing_to_do_where_a_support_was_chosen_before(tmp_path):
    model = adapted(by_data())
    callbacks = callbacks_for(model)
    ids = torch.randint(48, (2, 8))
    initialize_support(model, [{"input_ids": ids, "labels": ids}], show_progress=False)
    chosen = supports(model)
    run(model, tmp_path, 2, callbacks=callbacks)
    assert supports(model) == chosen


def test_a_callback_that_carries_one_rule_chooses_too(tmp_path):
    model = adapted(by_data(schedule=[Regrow(every=2, grow=AccumulatedGradient(steps=1))]))
    callback = MaskRegrowthCallback()
    run(model, tmp_path, 6, callbacks=[callback])
    assert callback.events
    assert all(len(units) for units in supports(model).values())


def test_sizes_do_not_change_under_a_wrapped_model():
    model = adapted(by_data(budget=Global(0.05)))
    training = Training(model, 1, arguments=SimpleNamespace(world_size=2), dataloader=[])
    with pytest.raises(ValueError, match=r"'fisher'.*2 processes have wrapped the model.*before creating the Trainer"):
        calibrate_waiting(training)


def test_a_trainer_that_hands_out_no_data_is_told_so():
    training = Training(adapted(by_data()), 1, arguments=SimpleNamespace(world_size=1))
    with pytest.raises(ValueError, match=r"hands its callbacks no dataloader.*calibrate\(model, dataloader\)"):
        calibrate_waiting(training)


# Loops without a Trainer


def loop(model, data, steps, *, state=None, optimizer_state=None, stop=None, **options):
    """AdamW over `data`, one batch a step; returns the optimizer and what a checkpoint needs."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    model.train()
    with Controller(model, optimizer, total_steps=steps, dataloader=data, state=state, **options) as rules:
        for batch in data[rules.step : stop]:
            rules.before_step()
            model(**batch).loss.backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
        saved = rules.state_dict()
    return optimizer, saved


def batches(count):
    data = TokenData(4 * count)
    stack = lambda key, at: torch.stack([data[i][key] for i in range(at, at + 4)])  # noqa: E731
    return [{key: stack(key, at) for key in ("input_ids", "labels")} for at in range(0, 4 * count, 4)]


@pytest.mark.parametrize("budget", [Density(0.05), Global(0.05)], ids=["uniform", "global"])
@pytest.mark.parametrize("criterion", ["fisher", "delta_magnitude"])
def test_a_plain_loop_chooses_as_a_call_before_it_would(criterion, budget):
    data = batches(6)
    by_hand, by_loop = (adapted(by_data(criterion, budget=budget)) for _ in range(2))
    initialize_support(by_hand, data, show_progress=False)
    expected = all_state(by_hand, loop(by_hand, data, 6)[0])
    found = all_state(by_loop, loop(by_loop, data, 6)[0])
    assert differences(expected, found) == []
    assert any(layer.sparse_lora_values["default"].any() for layer in layers_of(by_loop))


def test_a_plain_loop_without_data_is_refused_and_leaves_the_model_alone():
    model, data = adapted(by_data()), batches(2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"'fisher'.*Controller\(\.\.\., dataloader=\.\.\.\).*calibrate"):
        Controller(model, optimizer, total_steps=2)
    assert all(layer.awaits_calibration("default") for layer in layers_of(model))
    loop(model, data, 2)


def test_a_plain_loop_that_goes_on_takes_its_supports_from_the_checkpoint(monkeypatch):
    data, config = batches(6), by_data(schedule=[Regrow(every=2, grow=AccumulatedGradient(steps=1))])
    whole, first, second = (adapted(config) for _ in range(3))
    expected = all_state(whole, loop(whole, data, 6)[0])
    optimizer, state = loop(first, data, 6, stop=3)
    monkeypatch.setattr(start, "calibrate", lambda *args, **kwargs: pytest.fail("chosen again"))
    second.load_state_dict(first.state_dict())
    optimizer, _ = loop(second, data, 6, state=state, optimizer_state=optimizer.state_dict())
    assert differences(expected, all_state(second, optimizer)) == []


def test_a_model_inside_ddp_is_calibrated_without_its_wrapper():
    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            torch.nn.Module.__init__(self)
            self.module = module

        def forward(self, *args, **kwargs):
            pytest.fail("asked")

    by_hand, wrapped, data = adapted(by_data()), adapted(by_data()), batches(3)
    initialize_support(by_hand, data, show_progress=False)
    calibrate_waiting(Training(Wrapped(wrapped), 3, dataloader=data))
    assert supports(wrapped) == supports(by_hand)
