"""A run that is broken off leaves no mark: what comes next on the same model is what it would be on a fresh copy."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    AlternateModules,
    AverageRank,
    FactorExperts,
    FactorMaskConfig,
    Freeze,
    Gradient,
    GrowRank,
    L1Penalty,
    Linear,
    MaskRegrowthCallback,
    Prune,
    Random,
    RandomUnfired,
    Regrow,
    SampleLayers,
    SampleRank,
    SearchSupport,
    SparseLoraConfig,
    callbacks_for,
    methods,
)
from hf_sparse_peft.rules import moves
from hf_sparse_peft.training import SupportTelemetryCallback, ZerothOrderTrainer, zeroth_order_optimizer
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared.live_run import run_on

TARGETS = ["q_proj", "v_proj", "down_proj"]


def sparse(**options) -> SparseLoraConfig:
    defaults = {"r": 0, "density": 0.1, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return SparseLoraConfig(**{**defaults, **options})


CONFIGS = {
    "regrow": lambda: sparse(
        schedule=[Regrow(every=3, grow=AccumulatedGradient(steps=2), fraction=Linear(0.5, 0.0))]
    ),
    "rigl": lambda: sparse(
        schedule=[Regrow(every=2, grow=Gradient(), fraction=0.5, in_place_of_update=True)]
    ),
    "retired": lambda: sparse(
        schedule=[Regrow(every=2, grow=Random(), fraction=0.5, retired=0.5)]
    ),
    "unfired": lambda: sparse(
        schedule=[Regrow(every=2, drop="age", grow=RandomUnfired(), fraction=0.5)]
    ),
    "freeze": lambda: sparse(schedule=[Freeze(at=0.34, threshold=0.025)], criterion="smallest_magnitude"),
    "ranks": lambda: sparse(r=3, density=0.0, schedule=[Allocate(budget=AverageRank(1), every=1)]),
    "alternate-modules": lambda: sparse(schedule=[AlternateModules(period_steps=2)]),
    "sample-layers": lambda: sparse(schedule=[SampleLayers(trained=0.5, every=2, suppressed=0.5)]),
    "experts": lambda: sparse(
        r=4, density=0.0, factor_masks=FactorMaskConfig(kind="stochastic", experts=2),
        schedule=[FactorExperts(consistency=0.0)],
    ),
    "penalty": lambda: sparse(schedule=[L1Penalty(weight=10.0)]),
}  # fmt: skip


class Interrupt:
    """Raises `KeyboardInterrupt` in the middle of a forward pass, a backward pass, or a callback of step 3."""

    def __init__(self, where: str) -> None:
        self.where, self.step = where, 0

    def callbacks(self):
        def begin(step, model, optimizer):
            self.step = step

        def end(step, model, optimizer):
            if self.where == "callback" and step == 3:
                raise KeyboardInterrupt

        return [tiny.At(on_step_begin=begin, on_step_end=end)]

    def hook(self, model):
        last = adapter_layers(model)[-1]

        def forward(module, args, output):
            if self.step == 3 and module.training and torch.is_grad_enabled():
                if self.where == "forward":
                    raise KeyboardInterrupt
                if self.where == "backward":
                    output.register_hook(self._raise)

        return last.register_forward_hook(forward)

    @staticmethod
    def _raise(gradient):
        raise KeyboardInterrupt


def interrupted(model, out, where, callbacks, optimizer=None) -> None:
    broken = Interrupt(where)
    hook = broken.hook(model)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, out, 6, callbacks=[*callbacks, *broken.callbacks()], optimizer=optimizer)
    hook.remove()


def fresh_copy(model, config):
    """The same numbers in a model that no run has touched."""
    torch.manual_seed(0)
    fresh = get_peft_model(tiny.llama(layers=2), config())
    own, left = fresh.state_dict(), model.state_dict()
    fresh.load_state_dict({key: left[key].clone() for key in own if not _is_training_state(key)}, strict=False)
    for layer in adapter_layers(fresh):
        if layer.sparse_lora_values:
            layer.refresh_units()
    return fresh


def _is_training_state(key: str) -> bool:
    return "sparse_lora_rule_" in key


def same(one, other) -> bool:
    ours = {k: v for k, v in one.state_dict().items() if not _is_training_state(k)}
    theirs = {k: v for k, v in other.state_dict().items() if not _is_training_state(k)}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("where", ["forward", "backward", "callback"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_second_run_after_an_interrupt_is_what_a_fresh_model_would_train(name, where, tmp_path):
    if where == "callback" and name not in ("alternate-modules", "sample-layers", "retired", "freeze"):
        pytest.skip("nothing of it is on between two steps")
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(layers=2), CONFIGS[name]())
    interrupted(model, tmp_path, where, callbacks_for(model))
    fresh = fresh_copy(model, CONFIGS[name])
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in (model, fresh):
            tiny.train(one, tmp_path, 6, callbacks=callbacks_for(one))
    assert same(model, fresh)
    assert not all(torch.equal(before[k], v) for k, v in model.state_dict().items() if k in before)


@pytest.mark.parametrize("where", ["forward", "backward", "callback"])
@pytest.mark.parametrize("name", ["alternate-modules", "sample-layers", "regrow", "freeze"])
def test_a_run_without_callbacks_after_an_interrupt_trains_everything_and_says_what_is_missing(name, where, tmp_path):
    model = get_peft_model(tiny.llama(layers=2), CONFIGS[name]())
    interrupted(model, tmp_path, where, callbacks_for(model))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "sparse_lora_values" in n}
    with pytest.warns(UserWarning, match=f"asks for {sparse_option(name)}"):
        tiny.train(model, tmp_path, 3)
    after = dict(model.named_parameters())
    assert before
    assert all((after[n] != old).float().mean() > 0.9 for n, old in before.items())
    assert not any(layer.sparse_lora_gradient_readers for layer in adapter_layers(model))


def sparse_option(name: str) -> str:
    return name.replace("-", "_")


@pytest.mark.parametrize(("with_callbacks", "late"), [(True, False), (False, False), (True, True)])
def test_layer_sampling_on_lora_leaves_no_layer_frozen(with_callbacks, late, tmp_path):
    method = methods.get("ist", adapter=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model = get_peft_model(tiny.llama(layers=4), method.config)

    def stop(step, model, optimizer):
        raise KeyboardInterrupt

    callbacks = [*method.callbacks(model), tiny.At(on_step_end=stop)]
    args = tiny.arguments(tmp_path, 8)
    trainer = Trainer(model=model, args=args, train_dataset=tiny.TokenData(), callbacks=[] if late else callbacks)
    for callback in callbacks if late else []:
        trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    tiny.train(model, tmp_path, 12, callbacks=method.callbacks(model) if with_callbacks else ())
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and not torch.equal(p, before[n])]
    assert len(moved) == 4


def test_the_same_trainer_may_train_again_after_an_interrupt(tmp_path):
    model = get_peft_model(tiny.llama(layers=2), CONFIGS["alternate-modules"]())
    broken = Interrupt("backward")
    hook = broken.hook(model)
    args = tiny.arguments(tmp_path, 8)
    callbacks = [*callbacks_for(model), *broken.callbacks()]
    trainer = Trainer(model=model, args=args, train_dataset=tiny.TokenData(), callbacks=callbacks)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    hook.remove()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "values" in n}
    broken.where = ""
    trainer.train()
    assert len(trainer.callback_handler.callbacks)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_an_interrupted_support_search_leaves_the_adapters_own_support(tmp_path):
    model = get_peft_model(tiny.llama(layers=1), sparse(schedule=[SearchSupport(trials=3, steps=1)]))
    own = [layer.units("default").clone() for layer in adapter_layers(model)]
    seen = []

    def forward(module, args, output):
        seen.append(1)
        if len(seen) == 7:  # in the second or third trial
            raise KeyboardInterrupt

    hook = adapter_layers(model)[0].register_forward_hook(forward)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, tmp_path, 4, callbacks=callbacks_for(model))
    hook.remove()
    assert all(torch.equal(u, layer.units("default")) for u, layer in zip(own, adapter_layers(model), strict=True))
    assert not any(layer.sparse_lora_values["default"].any() for layer in adapter_layers(model))


def test_experts_drawn_for_an_interrupted_run_are_not_used_after_it(tmp_path):
    model = get_peft_model(tiny.llama(layers=1), CONFIGS["experts"]())
    interrupted(model, tmp_path, "backward", callbacks_for(model))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trains, evaluates = model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits
    assert torch.equal(trains, evaluates)


def test_telemetry_watches_no_gradient_after_an_interrupt(tmp_path):
    model = get_peft_model(tiny.llama(layers=1), sparse())
    interrupted(model, tmp_path, "backward", [SupportTelemetryCallback(every=1, gradient_share=True)])
    tiny.train(model, tmp_path, 1)
    # Nothing but telemetry ran, and its Trainer was given no schedule: the next look at the layer takes it away.
    assert all(layer.passive_gradient_reader is None for layer in adapter_layers(model))


def test_an_interrupt_within_a_move_leaves_values_under_their_own_units(tmp_path, monkeypatch):
    config = sparse(schedule=[Regrow(every=2, grow=Random(), fraction=0.5)])
    model = get_peft_model(tiny.llama(layers=1), config)
    layer, before, original = adapter_layers(model)[1], [], moves.move_rows

    def interrupted_rows(tensor, *places):
        original(tensor, *places)
        if tensor.data_ptr() == layer.sparse_lora_values["default"].data_ptr():
            raise KeyboardInterrupt

    def look(step, model, optimizer):
        before[:] = [layer.get_delta_weight("default")]

    monkeypatch.setattr(moves, "move_rows", interrupted_rows)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, tmp_path, 4, callbacks=[tiny.At(on_step_end=look), *callbacks_for(model)])
    assert before[0].any()
    assert torch.equal(layer.get_delta_weight("default"), before[0])


@pytest.mark.parametrize("name", ["freeze", "experts"])
def test_an_interrupt_right_after_an_optimizer_step_leaves_what_it_must_not_move(name, tmp_path):
    model, kept, seen = get_peft_model(tiny.llama(layers=1), CONFIGS[name]()), {}, []

    def resting(layer):
        if name == "freeze":
            frozen = layer.sparse_lora_rule_frozen["default"].bool()
            return layer.sparse_lora_values["default"].detach()[frozen].clone()
        owners = layer.sparse_lora_B_map["default"]
        gradient = layer.sparse_lora_B["default"].grad
        seen.append(int((gradient == 0).sum()))
        return layer.sparse_lora_B["default"].detach().clone(), owners.clone(), gradient == 0

    def pre(step, model, optimizer):
        if step == 5:
            kept.update({layer: resting(layer) for layer in adapter_layers(model)})

    def stepped(step, model, optimizer):
        if step == 5:
            raise KeyboardInterrupt

    look = [tiny.At(on_pre_optimizer_step=pre, on_optimizer_step=stepped)]
    with pytest.raises(KeyboardInterrupt):
        tiny.train(model, tmp_path, 8, callbacks=[*look, *callbacks_for(model)], weight_decay=0.5)
    for layer, old in kept.items():
        if name == "freeze":
            frozen = layer.sparse_lora_rule_frozen["default"].bool()
            assert frozen.any()
            assert torch.equal(layer.sparse_lora_values["default"][frozen], old)
        else:
            values, _, idle = old
            assert idle.any()
            assert torch.equal(layer.sparse_lora_B["default"][idle], values[idle])


@pytest.mark.parametrize("at", ["between-the-passes", "before-the-update", "while-parameters-shift"])
def test_an_interrupted_zeroth_order_step_leaves_the_parameters_where_they_were(at, tmp_path, monkeypatch):
    model = get_peft_model(tiny.llama(layers=1), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    args = tiny.arguments(tmp_path, 3)
    optimizer = zeroth_order_optimizer(model, args, epsilon=0.1)
    moved, shift, loss = [], optimizer._shift, ZerothOrderTrainer._loss_of_step

    def shifted(*given):
        moved.append(1)
        if at == "while-parameters-shift" and len(moved) == 2:
            raise KeyboardInterrupt
        shift(*given)

    def stop(step, model, optimizer):
        if at == "before-the-update":
            raise KeyboardInterrupt

    def second(self, *given):
        if at == "between-the-passes" and len(moved) > 4:
            raise KeyboardInterrupt
        return loss(self, *given)

    monkeypatch.setattr(optimizer, "_shift", shifted)
    monkeypatch.setattr(ZerothOrderTrainer, "_loss_of_step", second)
    trainer = ZerothOrderTrainer(
        model=model, args=args, train_dataset=tiny.TokenData(), optimizers=(optimizer, None),
        callbacks=[tiny.At(on_pre_optimizer_step=stop)],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for name, parameter in model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-6)
    assert optimizer.pending_gradient == 0


# When a run is over


def resting(model) -> list[str]:
    return [n for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad]


def trainer_that_stops(model, out, late=False, steps=8) -> Trainer:
    """Its third step is interrupted from a callback, while matrices rest."""
    seen = []

    def stop(step, model, optimizer):
        seen.append(resting(model))
        if step == 3:
            raise KeyboardInterrupt

    callbacks = [*callbacks_for(model), tiny.At(on_step_end=stop)]
    args = tiny.arguments(out, steps)
    trainer = Trainer(model=model, args=args, train_dataset=tiny.TokenData(), callbacks=[] if late else callbacks)
    for callback in callbacks if late else []:
        trainer.add_callback(callback)
    trainer.rested = seen
    return trainer


@pytest.mark.parametrize("late", [False, True], ids=["given", "added-later"])
def test_an_interrupted_run_is_over_when_train_is_left_before_anybody_looks(late, tmp_path):
    model = get_peft_model(tiny.llama(layers=2), CONFIGS["alternate-modules"]())
    trainer = trainer_that_stops(model, tmp_path, late)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert all(trainer.rested)
    assert resting(model) == []
    assert run_on(model) is None


def test_a_run_in_another_thread_goes_on_while_this_one_uses_the_model_and_ends_with_its_train(tmp_path):
    model = get_peft_model(tiny.llama(layers=2), CONFIGS["alternate-modules"]())
    trainer, ids, met = trainer_that_stops(model, tmp_path), torch.arange(1, 9)[None], threading.Barrier(2, timeout=60)
    trainer.add_callback(tiny.At(on_step_begin=lambda step, *_: [met.wait(), met.wait()] if step == 2 else None))
    caught = []

    def train():
        try:
            trainer.train()
        except KeyboardInterrupt as interrupt:
            caught.append(interrupt)

    thread = threading.Thread(target=train)
    thread.start()
    met.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(input_ids=ids)
    assert run_on(model) is not None
    assert resting(model)
    met.wait()
    thread.join(60)
    assert caught
    assert resting(model) == []
    assert run_on(model) is None


def test_a_trainer_that_is_built_while_another_trains_the_model_ends_nothing(tmp_path):
    model, live = get_peft_model(tiny.llama(layers=2), CONFIGS["alternate-modules"]()), []

    def build(step, model, optimizer):
        args = tiny.arguments(tmp_path, 1)
        other = Trainer(
            model=model, args=args, eval_dataset=tiny.TokenData(4), callbacks=callbacks_for(model)
        )  # fmt: skip
        other.evaluate()
        live.append(run_on(model))

    tiny.train(model, tmp_path, 2, callbacks=[*callbacks_for(model), tiny.At(on_step_begin=build)])
    assert len(live) == 2
    assert None not in live
    assert run_on(model) is None


def test_a_smaller_batch_after_running_out_of_memory_is_a_run_of_its_own(tmp_path):
    model, sizes = get_peft_model(tiny.llama(layers=2), CONFIGS["alternate-modules"]()), []

    def forward(module, args, output):
        if module.training and torch.is_grad_enabled():
            sizes.append(len(output))
            if sizes[-1] == 4 and len(sizes) == 3:
                raise RuntimeError("CUDA out of memory.")

    adapter_layers(model)[-1].register_forward_hook(forward)
    callbacks = callbacks_for(model)
    assert asks(model, tmp_path, callbacks, steps=8, auto_find_batch_size=True) == []
    assert sizes[:3] == [4, 4, 4]
    assert sizes[3] < 4
    assert [event["step"] for event in callbacks[0].events] == [0, 2, 4, 6]
    assert resting(model) == []


@pytest.mark.parametrize("late", [False, True], ids=["given", "added-later"])
def test_neither_model_nor_trainer_is_kept_alive_by_an_interrupted_run(late, tmp_path):
    model = get_peft_model(tiny.llama(layers=1), CONFIGS["alternate-modules"]())
    trainer = trainer_that_stops(model, tmp_path, late)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    gone = [weakref.ref(model), weakref.ref(trainer)]
    del model, trainer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


# Who attends


def asks(model, out, callbacks=(), steps=2, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.train(model, out, steps, callbacks=callbacks, **options)
    return [str(w.message) for w in caught if "asks for" in str(w.message)]


def stopped_early(model, out) -> None:
    class Stop(tiny.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 2

    assert asks(model, out, [*callbacks_for(model), Stop()], steps=8) == []


def test_a_run_without_callbacks_warns_once_after_a_run_with_them_stopped_early(tmp_path):
    model = get_peft_model(tiny.llama(layers=1), CONFIGS["regrow"]())
    stopped_early(model, tmp_path)
    assert len(asks(model, tmp_path)) == 1
    stopped_early(model, tmp_path)
    assert len(asks(model, tmp_path)) == 1  # the warning of the run before last is no excuse


@pytest.mark.parametrize("kept", [True, False], ids=["trainer-alive", "trainer-gone"])
@pytest.mark.parametrize("late", [False, True], ids=["given", "added-later"])
def test_a_run_without_callbacks_warns_after_an_interrupt_while_the_other_trainer_lives(kept, late, tmp_path):
    model = get_peft_model(tiny.llama(layers=1), CONFIGS["regrow"]())

    def stop(step, model, optimizer):
        raise KeyboardInterrupt

    callbacks = [*callbacks_for(model), tiny.At(on_step_end=stop)]
    args = tiny.arguments(tmp_path, 8)
    trainer = Trainer(model=model, args=args, train_dataset=tiny.TokenData(), callbacks=[] if late else callbacks)
    for callback in callbacks if late else []:
        trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = trainer if kept else None
    (message,) = asks(model, tmp_path)
    assert "regrow" in message


def test_a_copy_made_during_a_run_is_attended_by_nobody(tmp_path):
    model, copies = get_peft_model(tiny.llama(layers=1), CONFIGS["regrow"]()), []
    take = tiny.At(on_step_begin=lambda step, model, optimizer: copies.append(copy.deepcopy(model)))
    assert asks(model, tmp_path, [*callbacks_for(model), take], steps=6) == []
    assert len(asks(copies[1], tmp_path)) == 1


def test_a_schedule_whose_callback_alone_is_missing_is_named_alone(tmp_path):
    config = sparse(schedule=[Prune(every=1), Regrow(every=1, grow=Random())])
    model = get_peft_model(tiny.llama(layers=1), config)
    callbacks = [MaskRegrowthCallback()]
    (message,) = asks(model, tmp_path, callbacks, steps=4)
    assert "asks for prune," in message
    assert "regrow" not in message


def test_two_pass_training_is_asked_of_the_trainer_that_runs(tmp_path):
    method = methods.get("mosa", target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(layers=1), method.config)
    args = tiny.arguments(tmp_path, 1)
    method.trainer_class(model=model, args=args, train_dataset=tiny.TokenData(), callbacks=method.callbacks(model))
    with pytest.raises(ValueError, match=r"this Trainer makes one"):
        tiny.train(model, tmp_path, 1, callbacks=method.callbacks(model))


def test_a_run_inside_another_one_on_the_same_model_ends_that_one_with_an_error(tmp_path):
    model = get_peft_model(tiny.llama(layers=1), CONFIGS["alternate-modules"]())

    def train_again(step, model, optimizer):
        if step == 2:
            tiny.train(model, tmp_path, 2, callbacks=callbacks_for(model))

    with pytest.raises(ValueError, match="Another training run has begun on this model after 2 steps"):
        tiny.train(model, tmp_path, 6, callbacks=[*callbacks_for(model), tiny.At(on_step_end=train_again)])
    assert run_on(model) is None
    assert not resting(model)


@pytest.mark.parametrize("rule", [SampleRank(), GrowRank(AverageRank(3), modules=1, every=1, warmup=0)])
def test_callbacks_on_either_side_of_the_runner_see_the_adapter_that_is_saved(rule, tmp_path):
    model, seen = get_peft_model(tiny.llama(layers=1), sparse(r=4, density=0.0, schedule=[rule])), []
    for layer in adapter_layers(model):
        torch.nn.init.normal_(layer.sparse_lora_B["default"], std=0.1)

    def look(step, model, optimizer):
        if step < 4:  # at the last step ranks are final after it
            seen.append([layer.get_delta_weight("default").clone() for layer in adapter_layers(model)])

    class Other(tiny.At):
        pass

    callbacks = [tiny.At(on_step_end=look), *callbacks_for(model), Other(on_step_end=look)]
    tiny.train(model, tmp_path, 4, callbacks=callbacks)
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        assert all(map(torch.equal, before, after))
