"""IST over our adapters and over upstream LoRA: what is drawn, what rests, what the probes teach."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from training_toolbox import Hook, all_state, differences, run, tiny_llama

from hf_sparse_peft import SampleLayers, SparseLoraConfig, methods
from hf_sparse_peft.rules.sample_layers import updated_importance
from hf_sparse_peft.training import LayerSamplingCallback, RuleRunner

LAYERS = 8


def lora(**options):
    return LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)


def hybrid():
    targets = ["q_proj", "down_proj"]
    return SparseLoraConfig(r=2, lora_alpha=6, density=0.05, target_modules=targets, task_type="CAUSAL_LM")


ADAPTERS = {
    "lora": lambda: lora(rank_pattern={"down_proj": 3}),
    "dora": lambda: lora(use_dora=True),
    "sparse_lora": hybrid,
}


def build(kind, **options):
    method = methods.get("ist", adapter=ADAPTERS[kind](), **options)
    base = tiny_llama(layers=LAYERS)
    torch.manual_seed(5)
    return get_peft_model(base, method.config), method


def layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def adapter_parameters(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_quarter_of_the_layers_trains_and_the_rest_keeps_every_bit_and_moment(kind, tmp_path):
    model, method = build(kind, every=3)
    before, drawn = {}, []

    def snapshot(model, optimizer):
        state = getattr(optimizer, "optimizer", optimizer).state
        return {
            name: [p.detach().clone(), *(v.clone() for v in state.get(p, {}).values() if isinstance(v, torch.Tensor))]
            for name, p in adapter_parameters(model).items()
        }

    def begin(update, model, optimizer):
        before.clear()
        before.update(snapshot(model, optimizer))

    def look(update, model, optimizer):
        after = snapshot(model, optimizer)
        trains = {layer_of(name) for name, p in adapter_parameters(model).items() if p.requires_grad}
        assert len(trains) == int(0.25 * LAYERS)
        for name, old in before.items():
            same = len(old) == len(after[name]) and all(map(torch.equal, old, after[name]))
            assert same or layer_of(name) in trains, name
        moved = {layer_of(name) for name, old in before.items() if not torch.equal(old[0], after[name][0])}
        assert moved == trains
        drawn.append(frozenset(trains))

    run(
        model, tmp_path, 8, callbacks=method.callbacks(model), optimizer="default", decay=0.1,
        before=[Hook(on_step_begin=begin)], after=[Hook(on_step_end=look)],
    )  # fmt: skip
    assert len(set(drawn)) > 3
    assert all(p.requires_grad for p in adapter_parameters(model).values())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_probes_suppress_half_of_the_layers_and_restore_scaling_and_modes_and_random_state(kind, monkeypatch, tmp_path):
    model, method = build(kind, every=2)
    (callback,) = method.callbacks(model)
    seen, original = [], SampleLayers._suppressed
    run(model, tmp_path, 1, callbacks=[callback], optimizer="default")
    (sampling,) = callback.runs

    def scalings():
        layers = sampling.memory.layers.values()
        return [[held["default"] for space in spaces for held in space.scalings()] for spaces in layers]

    @contextmanager
    def watching(rule, one, numbers):
        with original(rule, one, numbers):
            seen.append((numbers, scalings()))
            yield

    monkeypatch.setattr(SampleLayers, "_suppressed", watching)
    before = scalings()
    assert kind != "sparse_lora" or {len(one) for one in before} == {4}  # both halves of both matrices
    sampling.training.dataloader = run(
        model, tmp_path, 1, callbacks=[], optimizer="default", train=False
    ).get_train_dataloader()
    sampling.training.step = 2
    model.train()
    model.base_model.model.model.norm.eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    sampling.rule._probe(sampling)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert scalings() == before
    assert len(seen) == 3
    assert len({tuple(numbers) for numbers, _ in seen}) == 3
    for numbers, suppressed in seen:
        assert len(numbers) == LAYERS // 2
        for number, (now, was) in enumerate(zip(suppressed, before, strict=True)):
            assert now == [value * 0.25 if number in numbers else value for value in was]


def test_suppression_reaches_the_output_of_both_halves():
    model, _ = build("sparse_lora")
    for p in adapter_parameters(model).values():
        p.data.normal_(std=0.3)
    layer = next(m for m in model.modules() if hasattr(m, "sparse_lora_support_scaling"))
    x = torch.randn(3, layer.in_features)
    base, full = layer.base_layer(x), layer(x)
    for held in (layer.sparse_lora_scaling, layer.sparse_lora_support_scaling):
        held["default"] *= 0.25
    torch.testing.assert_close(layer(x) - base, 0.25 * (full - base), rtol=1e-4, atol=1e-5)


def test_the_update_is_the_papers():
    importance, sets, losses = [0.3, -1.0, 0.0, 2.0], [[0, 1], [1, 2], [0, 3]], [1.2, 0.7, 2.0]
    rewards = [math.exp(-loss) for loss in losses]
    expected = list(importance)
    for k, chosen in enumerate(sets):
        for i in chosen:
            p = 1 / (1 + math.exp(-importance[i]))
            expected[i] += 10 * (rewards[k] - sum(rewards) / 3) * p * (1 - p)
    assert updated_importance(importance, sets, losses, 10.0) == pytest.approx(expected, rel=1e-12)
    assert updated_importance(importance, sets, [0.1, 0.1, 0.1], 10.0) == importance


def test_a_layer_that_does_nothing_becomes_the_least_important(tmp_path):
    # Only layer 2's adapter is the identity; suppressing any other hurts a model that has learned its data by heart.
    method = methods.get("ist", adapter=hybrid())
    model = get_peft_model(tiny_llama(layers=4), method.config)
    run(model, tmp_path, 60, callbacks=[], optimizer="default", lr=2e-2, batch=16)
    for name, p in adapter_parameters(model).items():
        if layer_of(name) == 2 and "_A" not in name:
            p.data.zero_()
    callback = LayerSamplingCallback(SampleLayers())
    run(model, tmp_path, 1, callbacks=[callback], optimizer="default", lr=0.0)
    (sampling,) = callback.runs
    for step in range(50):
        sampling.training.step = step
        sampling.rule._probe(sampling)
    importance = sampling.saved["importance"]
    assert max(range(4), key=lambda i: importance[i]) == 2, importance


@pytest.mark.parametrize("restores", [False, True])
@pytest.mark.parametrize("kind", ["lora", "sparse_lora"])
def test_resumed_training_goes_on_with_the_importance_it_had(kind, restores, tmp_path):
    def course(resume=None):
        last = {}
        model, method = build(kind, every=2)
        hook = Hook(on_step_end=lambda update, m, o: last.update(all_state(m, o)) if update == 9 else None)
        callbacks = method.callbacks(model)
        trainer = run(
            model, tmp_path, 9, callbacks=callbacks, optimizer="default", after=[hook], save_strategy="steps",
            save_steps=1, resume=resume, restore_callback_states_from_checkpoint=restores,
        )  # fmt: skip
        found = [c for c in trainer.callback_handler.callbacks if isinstance(c, RuleRunner)]
        return last, found[0].runs[0].saved["importance"]

    whole, importance = course()
    assert any(importance)
    for stop in (4, 5):
        resumed, again = course(str(tmp_path / f"checkpoint-{stop}"))
        assert again == importance
        assert differences(whole, resumed) == []


def test_probes_do_not_change_the_order_of_the_data(tmp_path):
    orders = []
    for interval in (2, 100):
        model, method = build("lora", every=interval)
        ids = []

        def look(module, args, kwargs, ids=ids):
            if module.training:
                ids.append(kwargs["input_ids"].clone())

        model.register_forward_pre_hook(look, with_kwargs=True)
        run(model, tmp_path, 6, callbacks=method.callbacks(model), optimizer="default")
        orders.append(torch.stack(ids))
    assert torch.equal(*orders)


def test_what_cannot_be_sampled_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(layers=2), lora())
    with pytest.raises(ValueError, match=r"no trained adapter whose schedule has SampleLayers"):
        run(model, tmp_path, 2, callbacks=[LayerSamplingCallback()], optimizer="default")
    options = SampleLayers(layers_pattern="towers")
    with pytest.raises(ValueError, match="no trained adapter inside numbered layers"):
        run(model, tmp_path, 2, callbacks=[LayerSamplingCallback(options)], optimizer="default")
    with pytest.raises(ValueError, match=r"SampleLayers.probes=1 is out of range"):
        SampleLayers(probes=1)
    config = copy.deepcopy(methods.get("ist").config)
    assert (config.r, config.lora_alpha, config.density) == (32, 64, 0.0)
    assert config.schedule == [SampleLayers(0.25, 0.5, 0.25, 3, 10, 10.0, 16)]
