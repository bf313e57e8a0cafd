"""LoSiA: when subnets move and where to, what stays of them, at which rate they go on, and that nothing is lost."""

import copy
import math

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hf_sparse_peft import RelocateSubnets, SparseLoraConfig, callbacks_for, hub, methods
from hf_sparse_peft.rules import Smoothed
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.tuners import adapter_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(base=None, layers=2, every=2, rate="rewarm", rule=None, **options):
    torch.manual_seed(0)
    rule = RelocateSubnets(every, rate=rate, **(rule or {}))
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", "subnet_shares": (0.25, 0.25), **options}
    config = SparseLoraConfig(**{"r": 0, "granularity": "subnet", "schedule": [rule], **options})
    return get_peft_model(tiny.llama(layers=layers) if base is None else base, config)


def runner_of(model):
    return next(one for one in callbacks_for(model) if isinstance(one, RuleRunner))


def places(model, name="default"):
    return {layer.module_name: [one.tolist() for one in layer.subnet(name)] for layer in adapter_layers(model)}


def deltas(model, name="default"):
    return {layer.module_name: layer.get_delta_weight(name).clone() for layer in adapter_layers(model)}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(1, 11)[None]).logits


def moved(out, steps=7, model=None, **options):
    """A model whose subnets have moved several times."""
    model = adapted(**options) if model is None else model
    tiny.train(model, out, steps, callbacks=callbacks_for(model), lr_scheduler_type="constant")
    assert any(layer.accumulated("default") is not None for layer in adapter_layers(model))
    return model


# The sheet's worked numbers


def test_the_variation_is_measured_from_the_new_average():
    average, variation = torch.zeros(1), torch.zeros(1)
    scores = []
    for _ in range(2):
        RelocateSubnets()._smoothed.take(torch.ones(1), average, variation)
        scores.append(Smoothed().read(average, variation).item())
    assert scores == pytest.approx([0.019125, 0.060148], abs=1e-6)  # 0.0225 and more from the old average


@pytest.mark.parametrize(
    ("importance", "expected"), [("mix", [0.0, 0.375, 4.0]), ("first", [0.0, 0.5, 2.0]), ("second", [0.0, 0.25, 4.0])]
)
def test_importance_is_of_second_order_in_weight_times_gradient(importance, expected):
    weight, gradient = torch.tensor([3.0, 0.25, 4.0]), torch.tensor([0.0, 2.0, -0.5])
    found = RelocateSubnets(importance=importance).importance_of(weight, gradient)
    assert found.tolist() == pytest.approx(expected)


def test_the_rate_is_the_published_one():
    rule = RelocateSubnets(every=50)
    assert [rule.rate_factor(t, 1000, None) for t in (0, 50)] == [0.0, 0.5]
    assert rule.rate_factor(99, 1000, 50) == pytest.approx(0.99)  # no second warm-up within the first
    found = [rule.rate_factor(t, 1000, 100) for t in (100, 125, 149, 150)]
    assert found == pytest.approx([0.0, 0.486431, 0.953404, 0.993163], abs=1e-6)
    assert rule.rate_factor(1000, 1000, 100) == pytest.approx(0.1)
    rewarm = RelocateSubnets(every=50, rate="rewarm")
    assert [rewarm.rate_factor(t, 1000, 100) for t in (100, 125, 150)] == [0.0, 0.5, 1.0]


# When


def test_layers_take_turns_and_each_moves_at_the_end_of_its_own(tmp_path):
    model = adapted(layers=3, every=4)
    runner, seen = runner_of(model), [places(model)]
    look = tiny.At(on_step_end=lambda *_: seen.append(places(model)))
    tiny.train(model, tmp_path, 17, callbacks=[runner, look])
    moves = {}
    for step in range(17):
        changed = {name for name in seen[0] if seen[step][name] != seen[step + 1][name]}
        if changed:
            moves[step] = {name.split(".")[2] for name in changed}
            assert len(changed) == len(TARGETS)
    assert moves == {3: {"0"}, 7: {"1"}, 11: {"2"}, 15: {"0"}}
    *events, last = runner.events
    assert [event["step"] for event in events] == [4, 8, 12, 16]
    changed = sum(int((delta != 0).sum()) for delta in deltas(model).values())
    assert last["changed"] == changed > sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_at_one_time_all_move_at_the_end_of_the_first_turn(tmp_path):
    model = adapted(every=2, rule={"asynchronous": False})
    runner = runner_of(model)
    tiny.train(model, tmp_path, 7, callbacks=[runner])
    assert [(event["step"], len(event["moved"])) for event in runner.events[:-1]] == [(2, 6), (6, 6)]


def test_a_run_without_a_move_is_refused_and_layers_that_never_move_are_named(tmp_path):
    with pytest.raises(ValueError, match="every=6 is not less than the run's 6 steps"):
        tiny.train(model := adapted(every=6), tmp_path, 6, callbacks=callbacks_for(model))
    with pytest.warns(UserWarning, match=r"leaves 1 moves in 4 steps.*1 of 2 layers \('model.layers.1'\)"):
        tiny.train(model := adapted(every=3), tmp_path, 4, callbacks=callbacks_for(model))


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="record=3 is more than the 2 steps"):
        RelocateSubnets(every=2, record=3)
    with pytest.raises(ValueError, match="no module has one"):
        SparseLoraConfig(schedule=[RelocateSubnets()])
    with pytest.raises(ValueError, match="accumulator=True keeps what subnets leave"):
        SparseLoraConfig(accumulator=True)


def test_a_rule_from_outside_of_the_config_wants_its_accumulator(tmp_path):
    model = adapted(schedule=[])
    with pytest.raises(ValueError, match=r"no accumulator to keep what it leaves.*accumulator=True"):
        tiny.train(model, tmp_path, 4, callbacks=[RuleRunner(RelocateSubnets(2))])
    model = adapted(schedule=[], accumulator=True)
    tiny.train(model, tmp_path, 4, callbacks=[RuleRunner(RelocateSubnets(2))])
    assert adapter_layers(model)[0].accumulated("default") is not None


# Where to


def greedy(Q, m, n):
    """The best of three greedy pairs, in plain float64."""

    def top(sums, count):
        return sorted(range(len(sums)), key=lambda i: -sums[i])[:count]

    rows, columns = Q.sum(1).tolist(), Q.sum(0).tolist()
    R, C = top(rows, m), top(columns, n)
    pairs = [(R, C), (R, top(Q[R].sum(0).tolist(), n)), (top(Q[:, C].sum(1).tolist(), m), C)]
    best = max(pairs, key=lambda pair: float(Q[pair[0]][:, pair[1]].sum()))
    return [sorted(best[0]), sorted(best[1])]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_subnet_goes_where_smoothed_sensitivities_of_the_weights_before_each_step_are_largest(accumulation, tmp_path):
    model = adapted(every=3, r=2, rule={"importance": "mix"})
    layers, seen, data = adapter_layers(model), [], []

    def whole_gradients(step, model, optimizer):
        """Dense gradients of the loss that this step is about to see, at its weights, in float64."""
        if step > 3:
            return
        plain = tiny.llama().double()
        for layer in layers:
            weight = plain.get_submodule(layer.module_name).weight
            weight.data += layer.get_delta_weight("default").double()
        seen.append((plain, {layer.module_name: plain.get_submodule(layer.module_name).weight for layer in layers}))

    inner = model.forward

    def forward(*args, **kwargs):
        if model.training:
            data.append({key: value.clone() for key, value in kwargs.items() if key in ("input_ids", "labels")})
        return inner(*args, **kwargs)

    model.forward = forward
    found = {}
    last = tiny.At(on_step_end=lambda step, *_: found.update(places(model)) if step == 3 else None)
    options = {"gradient_accumulation_steps": accumulation, "learning_rate": 0.3, "lr_scheduler_type": "constant"}
    tiny.train(model, tmp_path, 4, callbacks=[tiny.At(on_step_begin=whole_gradients), *callbacks_for(model), last],
               **options)  # fmt: skip
    average, variation, before = {}, {}, {}
    for step, (plain, weights) in enumerate(seen):
        for batch in data[step * accumulation : (step + 1) * accumulation]:
            (plain(**batch).loss / accumulation).backward()
        for name, weight in weights.items():
            a = weight.detach() * weight.grad
            importance = (a - a.square() / 2).abs()
            average[name] = 0.85 * average.get(name, 0) + 0.15 * importance
            variation[name] = 0.85 * variation.get(name, 0) + 0.15 * (importance - average[name]).abs()
            before[name] = weight
    for layer in layers[:3]:
        name = layer.module_name
        sides = layer.sparse_lora_subnet["default"].shape
        Q = average[name] * variation[name]
        assert found[name] == greedy(Q, *sides), name
        assert found[name] != greedy(before[name].detach().abs(), *sides)


def test_the_last_steps_of_a_turn_alone_are_read_where_asked(tmp_path):
    model, held = adapted(every=4, rule={"record": 2}), []
    layers = adapter_layers(model)
    look = tiny.At(on_step_begin=lambda *_: held.append([bool(layer.rule_state("default")) for layer in layers]))
    tiny.train(model, tmp_path, 9, callbacks=[*callbacks_for(model), look])
    first, second = [True] * 3 + [False] * 3, [False] * 3 + [True] * 3
    assert held == [[False] * 6] * 2 + [first] * 2 + [[False] * 6] * 2 + [second] * 2 + [[False] * 6]


def test_a_layer_without_gradients_keeps_its_subnet_and_is_named(tmp_path):
    model = adapted(every=2)
    before = places(model)
    with pytest.warns(UserWarning, match="the subnet was not moved in any of the 3 layers"):
        tiny.train(model, tmp_path, 3, callbacks=callbacks_for(model), data=tiny.TokenData(masked=True))
    assert places(model) == before


# What stays


def test_a_move_changes_no_weight_and_starts_the_optimizer_anew(tmp_path):
    model = adapted(every=3, subnet_shares=(0.4, 0.4))
    layers, before, steps = adapter_layers(model), {}, []

    def check(step, model, optimizer):
        after, state = deltas(model), getattr(optimizer, "optimizer", optimizer).state
        for layer in layers:
            values, name = layer.sparse_lora_subnet["default"], layer.module_name
            just_moved = places(model)[name] != before["places"][name]
            assert torch.equal(after[name], before["deltas"][name])
            if just_moved:
                assert not values.any()
                assert values not in state
                assert layer.accumulated("default").any()
            else:
                assert values in state
            steps.append(just_moved)

    def note(step, model, optimizer):
        before.update(places=places(model), deltas=deltas(model))

    callbacks = [tiny.At(on_step_end=note), *callbacks_for(model), tiny.At(on_step_end=check)]
    tiny.train(model, tmp_path, 8, callbacks=callbacks, lr_scheduler_type="constant")
    assert sum(steps) == 6


def test_after_a_move_no_step_is_larger_than_the_rate(tmp_path):
    model, sizes = adapted(every=4, rate="cosine_restarts", rule={"warmup": 0.0}), []
    layer, last = adapter_layers(model)[0], {}

    def begin(step, model, optimizer):
        last["values"] = layer.sparse_lora_subnet["default"].detach().clone()

    def end(step, model, optimizer):
        sizes.append(float((layer.sparse_lora_subnet["default"] - last["values"]).detach().abs().max()))

    callbacks = [tiny.At(on_step_begin=begin), tiny.At(on_optimizer_step=end), *callbacks_for(model)]
    tiny.train(model, tmp_path, 8, callbacks=callbacks, lr_scheduler_type="constant", learning_rate=1e-2,
               max_grad_norm=0)  # fmt: skip
    assert sizes[0] == pytest.approx(1e-2, rel=1e-3)
    assert sizes[4] == 0  # the first step of the rise
    assert [0 < size <= 1e-2 * number / 4 * 1.01 for number, size in enumerate(sizes[4:]) if number] == [True] * 3


class Two(nn.Module):
    """Two linears with biases, the first of which runs twice in a pass; neither lies in a numbered layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 20)

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


def with_accumulators(model, name="default"):
    """Values, and changes that were left behind."""
    for layer in adapter_layers(model):
        if name in layer.sparse_lora_accumulator:
            layer.sparse_lora_subnet[name].data.normal_()
            layer.accumulate_subnet(name)
            layer.write_subnet(name, rows=torch.arange(layer.sparse_lora_subnet[name].shape[0]))
            layer.sparse_lora_subnet[name].data.normal_()
    return model


def two(**options):
    model = adapted(Two(), target_modules=["first", "second"], task_type=None, **options)
    return with_accumulators(model)


def reference(model, names=("default",)):
    """The two linears in float64, every adapter's update added."""
    twin, layers = Two().double(), adapter_layers(model)
    for linear, layer in zip((twin.first, twin.second), layers, strict=True):
        linear.weight.data += sum(layer.get_delta_weight(name).double() for name in names)
    return twin


def test_outputs_and_gradients_are_those_of_the_base_with_all_that_was_learned():
    model = two(r=2)
    x, dy = torch.randn(7, 12, requires_grad=True), torch.randn(7, 20)
    y = model(x)
    y.backward(dy)
    twin, x64 = reference(model), x.detach().double().requires_grad_()
    twin(x64).backward(dy.double())
    torch.testing.assert_close(y.double(), twin(x64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    for linear, layer in zip((twin.first, twin.second), adapter_layers(model), strict=True):
        rows, columns = (one.long() for one in layer.subnet("default"))
        found = layer.sparse_lora_subnet["default"].grad.double()
        torch.testing.assert_close(found, linear.weight.grad[rows][:, columns], rtol=1e-4, atol=1e-4)


def test_adapters_with_accumulators_add_up_merge_and_leave():
    model = two()
    base = {key: value.clone() for key, value in model.state_dict().items() if "base_layer" in key}
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    with_accumulators(model, "other")
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, 12)
    y = model(x).detach()
    torch.testing.assert_close(y.double(), reference(model, ["default", "other"])(x.double()), rtol=1e-4, atol=1e-4)
    mixed = model.eval()(x, adapter_names=["default", "other", "__base__", "default", "other"])
    one = reference(model, ["other"])(x[1:2].double())
    torch.testing.assert_close(mixed[1:2].double(), one, rtol=1e-4, atol=1e-4)
    model.base_model.add_weighted_adapter(["default", "other"], [2.0, -1.0], "both", "linear")
    for layer in adapter_layers(model):
        expected = 2 * layer.get_delta_weight("default") - layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected)
    model.merge_adapter(["default", "other"])
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    twin = copy.deepcopy(model)
    adapter_layers(model)[0].sparse_lora_accumulator["default"].zero_()
    assert torch.equal(twin(x), y)
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert not any(".default" in name or ".other" in name for name in model.state_dict())
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items() if key in base)


def test_a_compiled_graph_reads_what_was_left_behind():
    model = two()
    x = torch.randn(6, 12)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
        with_accumulators(model)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8", "conv1d"])
def test_what_was_left_behind_is_in_files_merges_and_exports(kind, tmp_path):
    options = {"target_modules": ["c_attn", "c_proj"]} if kind == "conv1d" else {}
    model = adapted(tiny.base(kind), every=1, **options)
    plain = logits(model)
    moved(tmp_path / "run", 5, model)
    y = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.base(kind), tmp_path / "adapter")
    assert torch.equal(logits(loaded), y)
    hub.check_adapter(tmp_path / "adapter")
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    if kind == "fp32":
        with pytest.raises(ValueError, match="no exact low-rank form"):
            hub.export_lora(model, tmp_path / "lora")
        hub.export_lora(model, tmp_path / "lora", rank=64)
        peft_only = PeftModel.from_pretrained(tiny.base(), tmp_path / "lora")
        torch.testing.assert_close(logits(peft_only), y, atol=1e-5, rtol=1e-5)
    model.merge_adapter()
    if kind in ("fp32", "conv1d"):
        torch.testing.assert_close(logits(model), y, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)


def test_before_the_first_move_it_leaves_as_a_lora_exactly(tmp_path):
    model = adapted()
    for layer in adapter_layers(model):
        layer.sparse_lora_subnet["default"].data.normal_(0, 0.1)
    ranks = hub.export_lora(model, tmp_path).ranks
    assert set(ranks.values()) == {4, 8}  # a quarter of the smaller side
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny.base(), tmp_path)), logits(model), atol=1e-5, rtol=1e-5
    )


def test_it_leaves_as_shira_exactly_and_compaction_loses_nothing(tmp_path):
    model = moved(tmp_path / "run", subnet_shares=(0.1, 0.1))
    y = logits(model)
    hub.export_shira(model, tmp_path / "shira")
    found = logits(PeftModel.from_pretrained(tiny.base(), tmp_path / "shira"))
    torch.testing.assert_close(found, y, atol=1e-5, rtol=1e-5)
    for layer in adapter_layers(model):
        layer.sparse_lora_subnet["default"].data.zero_()
    y = logits(model)
    model.compact(compact_tolerance=0.0)
    assert torch.equal(logits(model), y)
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        model.compact(values_dtype=dtype)
        model.save_pretrained(tmp_path / dtype)
        sizes[dtype] = (tmp_path / dtype / "adapter_model.safetensors").stat().st_size
        assert torch.equal(logits(PeftModel.from_pretrained(tiny.base(), tmp_path / dtype)), logits(model))
    assert sizes["bfloat16"] < 0.65 * sizes["float32"]


# Runs


@pytest.mark.parametrize(("stop", "every"), [(4, 2), (5, 3), (7, 3)])
@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_run_resumed_within_a_turn_equals_the_whole_one_to_the_last_bit(kind, stop, every, tmp_path):
    def run(out, resume=None, save=None):
        model = adapted(tiny.base(kind), every=every, rate="cosine_restarts", modules_to_save=["lm_head"], bias="none")
        state = {}

        def end(step, model, optimizer):
            if step == 10:
                names = {p: n for n, p in model.named_parameters()}
                state.update({k: v.clone() for k, v in model.state_dict().items() if "lora" in k or "lm_head" in k})
                inner = getattr(optimizer, "optimizer", optimizer).state
                state.update({f"{names[p]}.{k}": v.clone() for p, held in inner.items() for k, v in held.items()})

        class Save(tiny.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_save = state.global_step == save

        options = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, "weight_decay": 0.01}
        tiny.train(model, out, 10, callbacks=[*callbacks_for(model), tiny.At(on_step_end=end), Save()], resume=resume,
                   **options)  # fmt: skip
        return state, places(model)

    whole, where = run(tmp_path, save=stop)
    resumed, there = run(tmp_path, resume=str(tmp_path / f"checkpoint-{stop}"))
    assert where == there
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_second_run_goes_on_from_what_the_first_has_left(tmp_path):
    model = moved(tmp_path)
    kept = {layer.module_name: layer.accumulated("default").clone() for layer in adapter_layers(model)}
    start = deltas(model)
    seen = {}
    look = tiny.At(on_step_begin=lambda step, *_: seen.update(deltas(model)) if step == 1 else None)
    tiny.train(model, tmp_path, 7, callbacks=[*callbacks_for(model), look], lr_scheduler_type="constant")
    assert all(torch.equal(seen[name], start[name]) for name in seen)
    assert all(
        not torch.equal(layer.accumulated("default"), kept[layer.module_name]) for layer in adapter_layers(model)
    )
    assert not any("rule_" in name for name in model.state_dict())


def test_a_run_that_breaks_off_in_a_turn_leaves_the_next_one_a_clean_start(tmp_path):
    class Broken(Exception):
        pass

    def fail(step, model, optimizer):
        if step == 5:
            raise Broken

    model = adapted(every=3)
    with pytest.raises(Broken):
        tiny.train(model, tmp_path, 10, callbacks=[*callbacks_for(model), tiny.At(on_pre_optimizer_step=fail)])
    assert not any(layer.sparse_lora_gradient_readers for layer in adapter_layers(model))
    held = []
    look = tiny.At(on_step_begin=lambda *_: held.append([bool(layer.rule_state("default")) for layer in layers]))
    layers = adapter_layers(model)
    tiny.train(model, tmp_path, 4, callbacks=[*callbacks_for(model), look])
    assert held[0] == [True] * 3 + [False] * 3


def test_two_adapters_of_which_one_moves(tmp_path):
    model = adapted()
    model.add_adapter("rows", SparseLoraConfig(r=0, density=0.2, granularity="row", target_modules=TARGETS))
    model.base_model.set_adapter(["default", "rows"])
    before = places(model)
    tiny.train(model, tmp_path, 5, callbacks=callbacks_for(model))
    assert all(places(model)[name] != before[name] for name in before)


# By name


def test_losia_has_the_papers_defaults_and_sizes():
    config = methods.get("losia").config
    (rule,) = config.schedule
    assert (rule.every, rule.importance, rule.beta1, rule.beta2, rule.refined) == (100, "mix", 0.85, 0.85, False)
    assert (rule.rate, rule.warmup, rule.floor, rule.asynchronous) == ("cosine_restarts", 0.1, 0.1, True)
    model = get_peft_model(tiny.llama(hidden=64), methods.get("losia", task_type="CAUSAL_LM").config)
    total = 0
    for layer in adapter_layers(model):
        sides = layer.sparse_lora_subnet["default"].shape
        assert tuple(sides) == (int(layer.out_features / 8), int(layer.in_features / 8))
        total += math.prod(sides)
    assert model.get_nb_trainable_parameters()[0] == total
