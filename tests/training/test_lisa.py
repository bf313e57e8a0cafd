"""LISA's draws, what rests, and what happens to the optimizer's state, over our adapters and upstream's."""

import math
from collections import Counter

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from training_toolbox import Hook, StopAt, all_state, differences, run, tiny_llama

from hf_sparse_peft import SparseLoraConfig, SwitchLayers, callbacks_for, methods

LAYERS = 6
TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ADAPTERS = {
    "sparse_lora": lambda: SparseLoraConfig(r=2, density=0.05, **TARGETS),
    "lora": lambda: LoraConfig(r=2, **TARGETS),
}


def built(kind="sparse_lora", head=False, **options):
    adapter = ADAPTERS[kind]()
    adapter.modules_to_save = ["lm_head"] if head else None
    method = methods.get("lisa", adapter=adapter, **options)
    torch.manual_seed(5)
    return get_peft_model(tiny_llama(layers=LAYERS), method.config), method


def layer_of(name: str) -> int | None:
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None


def adapter_bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name or "modules_to" in name}


@pytest.mark.parametrize("state", ["reset", "keep", "drop"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_two_layers_and_the_head_change_and_the_rest_keeps_every_bit_under_momentum_and_decay(kind, state, tmp_path):
    model, method = built(kind, head=True, layers=2, every=3, moments=state)
    seen, changed, held = [adapter_bits(model)], [], []

    def look(step, model, optimizer):
        now = adapter_bits(model)
        changed.append({layer_of(name) for name in now if not torch.equal(now[name], seen[-1][name])})
        seen.append(now)
        state = getattr(optimizer, "optimizer", optimizer).state
        held.append({layer_of(n) for n, p in model.named_parameters() if state.get(p)})

    callbacks = [*method.callbacks(model), Hook(on_step_end=look)]
    run(model, tmp_path, 9, callbacks=callbacks, optimizer="default", decay=0.1)
    assert all(len(layers - {None}) == 2 and None in layers for layers in changed)
    assert [changed[at] == changed[at + 1] for at in range(8)] == [True, True, False] * 2 + [True, True]
    if state == "drop":
        assert held == changed
    elif state == "keep":
        assert len(held[-1]) > 3


def test_a_reset_begins_all_moments_anew_and_a_kept_state_does_not(tmp_path):
    steps = {}
    for state in ("reset", "keep"):
        model, method = built(layers=2, every=2, moments=state, head=True)
        found = steps.setdefault(state, [])

        def look(step, model, optimizer, found=found):
            entries = getattr(optimizer, "optimizer", optimizer).state
            (head,) = [p for n, p in model.named_parameters() if "modules_to_save" in n and p.requires_grad]
            found.append(int(entries[head]["step"]))

        run(model, tmp_path, 6, callbacks=[*method.callbacks(model), Hook(on_step_end=look)], optimizer="default")
    assert steps == {"reset": [1, 2, 1, 2, 1, 2], "keep": [1, 2, 3, 4, 5, 6]}


def test_all_layers_with_a_kept_state_are_a_run_without_the_rule_to_the_last_bit(tmp_path):
    ends = []
    for rule in (SwitchLayers(LAYERS, every=2, moments="keep"), None):
        torch.manual_seed(5)
        config = SparseLoraConfig(r=2, density=0.05, schedule=[rule] if rule else [], **TARGETS)
        model = get_peft_model(tiny_llama(layers=LAYERS), config)
        run(model, tmp_path, 5, optimizer="default")
        ends.append(adapter_bits(model))
    assert not differences(*ends)
    losses = []
    for layers in (1, LAYERS):
        model, method = built(layers=layers, every=2, moments="keep")
        trainer = run(model, tmp_path, 5, callbacks=method.callbacks(model), optimizer="default")
        losses.append(trainer.state.log_history[-1]["train_loss"])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("state", ["reset", "drop"])
@pytest.mark.parametrize("middle", [4, 6])
def test_a_run_that_stops_goes_on_to_the_bit_in_and_at_the_end_of_an_interval(kind, state, middle, tmp_path):
    def end(folder, stop=None, resume=None):
        model, method = built(kind, layers=2, every=3, moments=state)
        found = {}
        hook = Hook(on_step_end=lambda step, model, optimizer: found.update(now=all_state(model, optimizer)))
        callbacks = [*method.callbacks(model), hook, *([StopAt(stop)] if stop else [])]
        run(model, tmp_path / folder, 9, callbacks=callbacks, optimizer="default", resume=resume)
        return found["now"]

    whole = end("whole")
    end("stopped", stop=middle)
    assert not differences(whole, end("again", resume=str(tmp_path / "stopped" / f"checkpoint-{middle}")))


def test_every_layer_is_drawn_as_often_as_the_others():
    rule, counts, draws = SwitchLayers(2), Counter(), 10_000

    class Stub:
        seed = 7

        class memory:
            layers = dict.fromkeys(f"model.layers.{at}" for at in range(LAYERS))

    for start in range(draws):
        drawn = rule.draw(Stub, torch.ones(LAYERS), lambda there: 2, start, "switched")
        assert len(set(drawn)) == 2
        counts.update(drawn)
    p = 2 / LAYERS
    error = 3 * math.sqrt(p * (1 - p) / draws)
    assert all(abs(counts[layer] / draws - p) < error for layer in range(LAYERS))


def test_the_published_count_of_trained_numbers_follows_from_the_sizes_alone():
    vocabulary, hidden, ffn, kv = 128_256, 4096, 14_336, 1024
    always = 2 * vocabulary * hidden + hidden
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden
    assert (always, layer, always + 2 * layer) == (1_050_677_248, 218_112_000, 1_486_901_248)


def test_what_lies_outside_of_the_layers_rests_where_that_is_asked_for(tmp_path):
    model = get_peft_model(
        tiny.llama(layers=4),
        SparseLoraConfig(
            r=2, density=0.0, target_modules=["q_proj", "lm_head"], schedule=[SwitchLayers(1, 2, always_on=False)]
        ),
    )
    before = adapter_bits(model)
    tiny.train(model, tmp_path, 4, callbacks=callbacks_for(model))
    changed = {layer_of(name) for name, bits in adapter_bits(model).items() if not torch.equal(bits, before[name])}
    assert None not in changed
    assert changed


def test_drawing_all_layers_says_that_nothing_is_switched(tmp_path):
    model, method = built(layers=LAYERS)
    with pytest.warns(UserWarning, match=r"SwitchLayers\.layers=6 of 6 layers trains all"):
        run(model, tmp_path, 1, callbacks=method.callbacks(model), optimizer="default")
