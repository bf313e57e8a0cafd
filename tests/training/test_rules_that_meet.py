"""Rules on one adapter: what rests is bit-identical while it rests, whichever other rule acts at the same steps."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import (
    Allocate,
    AlternateModules,
    AverageRank,
    Freeze,
    Gradient,
    KernelLoraConfig,
    Prune,
    Random,
    Regrow,
    SampleLayers,
    SparseLoraConfig,
    callbacks_for,
    methods,
)
from hf_sparse_peft.rules import Rule, Run, Training
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared.live_run import begin_run

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 12
TURNS = AlternateModules(period_steps=3)


def config_of(*rules: Rule, **options) -> SparseLoraConfig:
    fields = {"r": 4, "density": 0.1, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return SparseLoraConfig(**{**fields, "schedule": list(rules), **options})


def held_by(layer, name) -> dict[str, torch.Tensor]:
    """Everything that the layer keeps of an adapter and that a step might change."""
    tensors = {
        f"{kind}": getattr(layer, kind)[name] for kind in layer.adapter_layer_names if name in getattr(layer, kind)
    }
    for kind in ("sparse_lora_support", "sparse_lora_rank_mask", "kernel_lora_survivors"):
        if name in getattr(layer, kind, {}):
            tensors[kind] = getattr(layer, kind)[name]
    return tensors


class Watch:
    """Compares, at every step, what had no gradient with what it was before the step."""

    def __init__(self, adapter: str = "default") -> None:
        self.adapter, self.before, self.trains = adapter, {}, []
        self.callbacks = [
            tiny.At(on_step_begin=self.begin), tiny.At(on_pre_optimizer_step=self.look), tiny.At(on_step_end=self.end)
        ]  # fmt: skip

    def begin(self, step, model, optimizer):
        self.before = {
            layer: {k: t.detach().clone() for k, t in held_by(layer, self.adapter).items()}
            for layer in adapter_layers(model)
        }

    def look(self, step, model, optimizer):
        def has_gradient(layer):
            held = [getattr(layer, kind) for kind in layer.adapter_layer_names]
            return any(h[self.adapter].grad is not None for h in held if self.adapter in h)

        self.trains.append({layer for layer in adapter_layers(model) if has_gradient(layer)})

    def end(self, step, model, optimizer):
        for layer in set(self.before) - self.trains[-1]:
            for kind, tensor in held_by(layer, self.adapter).items():
                assert torch.equal(tensor, self.before[layer][kind]), (step, layer.module_name, kind)


def watched(config, out, steps=STEPS, layers=2, callbacks=None, **options):
    torch.manual_seed(0)
    model, watch = get_peft_model(tiny.llama(layers=layers), config), Watch()
    # The first looks come before any rule has dropped or moved something at this step, the last when all have.
    begin, look, end = watch.callbacks
    rules = callbacks_for(model) if callbacks is None else callbacks
    tiny.train(model, out, steps, callbacks=[begin, look, *rules, end], weight_decay=0.1, **options)
    return model, watch.trains, rules


def test_who_trains_under_alternation_and_layer_sampling_is_who_both_let_train(tmp_path):
    config = config_of(TURNS, SampleLayers(trained=0.5, every=5, probes=2))
    model, trains, rules = watched(config, tmp_path, layers=4)
    ((alternate, sampling),) = (rule.runs for rule in rules)
    names = [{layer.module_name for layer in step} for step in trains]
    for step, found in enumerate(names):
        assert found <= set(alternate.events[step // 3]["trains"])
        assert len({name.split("layers.")[1][0] for name in found}) <= len(sampling.memory.trained)
    assert any(names)
    assert all(p.requires_grad for n, p in model.named_parameters() if "sparse_lora_" in n)


def test_what_pruning_takes_from_matrices_that_rested_follows_when_they_train_again(tmp_path):
    for scope in ("layer", "global"):
        pruning = Prune(start=0.0, end=0.25, every=2, final_fraction=0.5, scope=scope)
        config = config_of(pruning, TURNS, r=0)
        model, _, _ = watched(config, tmp_path)
        layers = adapter_layers(model)
        left = sum(layer.units("default").numel() for layer in layers)
        capacity = [layer.sparse_lora_values["default"].shape[0] for layer in layers]
        assert left == pytest.approx(sum(round(0.5 * n) for n in capacity), abs=len(layers))


def test_pruning_that_layers_slept_through_is_named(tmp_path):
    config = config_of(Prune(start=0.1, end=0.9), AlternateModules(period_steps=12), r=0)
    with pytest.warns(UserWarning, match=r"final_fraction=0\.5 was not reached: \d layers"):
        watched(config, tmp_path)


def test_ranks_reach_their_budget_although_half_of_the_matrices_rest(tmp_path):
    allocation = Allocate(budget=AverageRank(2), every=1, initial_warmup=0.1, final_warmup=0.7)
    turns = AlternateModules(period_steps=2)
    model, _, _ = watched(config_of(turns, allocation, density=0.0), tmp_path, steps=24)
    alive = [layer.alive_components("default") for layer in adapter_layers(model)]
    assert sum(alive) == 2 * len(alive)


class RestInTurns(tiny.TrainerCallback):
    """A rule of somebody else's: the even layers rest at odd steps and the odd ones at even steps."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.layers = adapter_layers(model)
        self.run = begin_run(model, self.layers, state)
        self.run.join(self, lambda: self.run.mask.hold(self, []))

    def on_step_begin(self, args, state, control, **kwargs):
        resting = self.layers[state.global_step % 2 :: 2]
        self.run.mask.hold(self, [p for layer in resting for p in layer.parameters() if p.requires_grad])

    def on_train_end(self, args, state, control, **kwargs):
        self.run.leave(self)


def test_entries_of_kernel_adapters_at_rest_stay_theirs_while_matrices_compete(tmp_path):
    competition = tiny.kernel_allocation(0.5, initial_warmup=0.0, final_warmup=0.3)
    config = KernelLoraConfig(r=4, target_modules=TARGETS, sparsity=0.0, schedule=[competition])
    model, trains, _ = watched(config, tmp_path, callbacks=[RestInTurns(), *callbacks_for(config)])
    assert [len(step) for step in trains] == [3] * STEPS
    layers = adapter_layers(model)
    assert sum(layer.survivors("default") for layer in layers) == sum(
        layer.numel - round(0.5 * layer.numel) for layer in layers
    )


# A step that a move takes the place of


def rigl(**options) -> SparseLoraConfig:
    moves = Regrow(every=2, grow=Gradient(), fraction=0.5, in_place_of_update=True)
    return config_of(moves, r=0, target_modules=["q_proj"], **options)


def changed_at_moves(model, out, steps=5, **options) -> dict[str, list[bool]]:
    """Trained parameter -> whether it changed at the steps of moves, judged between backward and the moves."""
    before, found = {}, {}

    def pre(step, model, optimizer):
        before.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    def stepped(step, model, optimizer):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and step in (2, 4):
                found.setdefault(name, []).append(not torch.equal(parameter, before[name]))

    rules = callbacks_for(model)
    watch = [tiny.At(on_pre_optimizer_step=pre), tiny.At(on_optimizer_step=stepped)]
    tiny.train(model, out, steps, callbacks=[*rules, *watch], weight_decay=0.1, **options)
    return found


def test_a_skipped_step_is_that_of_the_moving_supports_alone(tmp_path):
    model = get_peft_model(tiny.llama(layers=1), rigl(modules_to_save=["lm_head"]))
    model.add_adapter("still", config_of(r=0, target_modules=["q_proj"], seed=1))
    model.add_adapter("slow", config_of(Regrow(every=3, grow=Random()), r=2, target_modules=["q_proj"], seed=2))
    model.base_model.set_adapter(["default", "still", "slow"])
    found = changed_at_moves(model, tmp_path)
    moving = [name for name in found if "values.default" in name]
    assert len(moving) == 1
    assert not any(found[moving[0]])
    others = {name: seen for name, seen in found.items() if name not in moving}
    assert {name.split(".")[-1 if "lora_" in name else -2] for name in others} >= {"still", "slow"}
    assert any("lm_head" in name for name in others)
    assert all(all(seen) for seen in others.values()), others


def test_a_skipped_step_leaves_biases_and_the_low_rank_half_their_update(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(layers=1, attention_bias=True), rigl(bias="sparse_lora_only"))
    found = changed_at_moves(model, tmp_path)
    assert any("bias" in name for name in found)
    assert all(all(seen) != ("values" in name) for name, seen in found.items())


def test_sara_leaves_out_the_update_of_its_entries_only(tmp_path):
    freezing = Freeze(at=0.5, threshold=0.3)
    model = get_peft_model(tiny.llama(layers=1), config_of(freezing, r=2, target_modules=["q_proj"]))
    found = changed_at_moves(model, tmp_path, steps=8)  # step 4 is the adjustment's
    assert [seen for name, seen in found.items() if "values" in name] == [[True, False]]
    assert all(seen == [True, True] for name, seen in found.items() if "values" not in name)


def test_fp16_without_clipping_is_refused_only_where_nothing_else_takes_the_step():
    model = get_peft_model(tiny.llama(layers=1), rigl())
    spaces = [layer.unit_spaces("default")[0] for layer in adapter_layers(model)]
    config = model.peft_config["default"]
    alone = torch.optim.SGD([space.values for space in spaces], lr=0.1)
    others = torch.optim.SGD([*(space.values for space in spaces), torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    def begin(optimizer, clips):
        training = Training(model, total_steps=8, optimizer=optimizer, fp16=True, clips=clips)
        rule = config.schedule[0]
        rule.begin(Run(training, rule, "default", config, spaces))

    with pytest.raises(ValueError, match=r"Regrow\.in_place_of_update.*max_grad_norm above 0"):
        begin(alone, clips=False)
    begin(others, clips=False)
    begin(alone, clips=True)


def test_two_rigl_adapters_on_one_layer_grow_by_the_same_summed_gradient(tmp_path):
    """Each adapter's grown units are the largest |g1 + g2| outside its support, g from an independent product."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.llama(layers=1), rigl(seed=0))
    model.add_adapter("b", rigl(seed=1))
    model.base_model.set_adapter(["default", "b"])
    (layer,) = adapter_layers(model)
    inputs, total, before, after = [], [0], {}, {}
    layer.register_forward_hook(lambda m, args, out: (inputs.append(args[0].detach()), None)[1])
    layer.register_full_backward_hook(lambda m, gi, go: gradient(go[0]))

    def gradient(dy):
        x = inputs.pop()
        total[0] = total[0] + (dy.flatten(0, -2).double().t() @ x.flatten(0, -2).double())

    def begin(step, model, optimizer):
        inputs.clear()
        total[0] = 0

    def pre(step, model, optimizer):
        if step == 2:
            before.update({name: layer.units(name).long().tolist() for name in ("default", "b")})
            before["gradient"] = total[0].flatten().abs()

    def end(step, model, optimizer):
        if step == 2:
            after.update({name: layer.units(name).long().tolist() for name in ("default", "b")})

    look = tiny.At(on_step_begin=begin, on_pre_optimizer_step=pre, on_step_end=end)
    tiny.train(
        model, tmp_path, 4, callbacks=[*callbacks_for(model), look], per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    for name in ("default", "b"):
        old, new = set(before[name]), set(after[name])
        rank = before["gradient"].clone()
        count = math.floor(0.5 * len(old))
        rank[sorted(old & new)] = -1  # survivors do not compete; a dropped unit may return at once
        best = set(rank.topk(count).indices.tolist())
        assert new - old <= best
        assert len(new - old) > count // 2


def test_registered_rigl_still_moves_with_half_of_the_matrices_at_rest(tmp_path):
    method = methods.get("rigl", every=2, density=0.1, fraction=0.5, target_modules=TARGETS)
    method.config.schedule.append(AlternateModules(period_steps=3))
    _, trains, rules = watched(method.config, tmp_path)
    runner = next(rule for rule in rules if isinstance(rule, RuleRunner))
    moves = [event for event in runner.events if event["rule"] == "regrow"]
    assert sum(move["replaced"] for move in moves) > 0
    assert all(len(step) < 6 for step in trains)
