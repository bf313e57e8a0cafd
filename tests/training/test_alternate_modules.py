"""HFT: which modules train in a period, and that the frozen ones keep every bit."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from training_toolbox import Hook, TokenData, all_state, differences, layers_of, run, tiny_llama

from hf_sparse_peft import AlternateModules, KernelLoraConfig, methods
from hf_sparse_peft.training import RuleRunner

ATTENTION, FFN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def names_of(blocks: int) -> list[str]:
    return [
        f"model.layers.{i}.{part}.{name}"
        for i in range(blocks)
        for part, names in (("self_attn", ATTENTION), ("mlp", FFN))
        for name in names
    ]


@pytest.mark.parametrize("blocks", [4, 5])
def test_two_attention_matrices_and_one_or_two_of_the_ffn_train_in_every_block(blocks):
    ffn, seen = [], set()
    for number in range(8):
        chosen = AlternateModules().choose(names_of(blocks), number, seed=0)
        seen.add(frozenset(chosen))
        counts = []
        for i in range(blocks):
            assert sum(f"layers.{i}.self_attn" in name for name in chosen) == 2
            counts.append(sum(f"layers.{i}.mlp" in name for name in chosen))
        assert set(counts) == {1, 2}
        ffn += counts
    assert sum(ffn) / len(ffn) == 1.5
    assert len(seen) == 8
    assert AlternateModules().choose(names_of(blocks), 3, 0) in seen
    assert AlternateModules().choose(names_of(blocks), 3, 1) not in seen


@pytest.mark.parametrize("level", ["block", "model"])
def test_halves_of_blocks_and_models(level):
    chosen = AlternateModules(level=level).choose(names_of(4), 0, 0)
    counts = [sum(f"layers.{i}." in name for name in chosen) for i in range(4)]
    assert sum(counts) == 14
    assert level == "model" or set(counts) == {3, 4}


def mha(layers=2):
    return tiny.llama(layers=layers, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48, vocab_size=48)


def test_the_frozen_half_keeps_every_bit_and_no_optimizer_state(tmp_path):
    model = get_peft_model(mha(), methods.get("hft", period_steps=3, task_type="CAUSAL_LM").config)
    before, checked, seen = {}, [], []

    def begin(update, model, optimizer):
        before.clear()
        for layer in layers_of(model):
            before[layer.module_name] = layer.sparse_lora_values["default"].detach().clone()

    def look(update, model, optimizer):
        state = getattr(optimizer, "optimizer", optimizer).state
        trains = set()
        for layer in layers_of(model):
            values = layer.sparse_lora_values["default"]
            if values.requires_grad:
                trains.add(layer.module_name)
                assert not torch.equal(values, before[layer.module_name])
                assert int(state[values]["step"]) == (update - 1) % 3 + 1  # fresh at the period's start
            else:
                assert torch.equal(values, before[layer.module_name])
                assert values not in state
        if update > 3:  # learned in an earlier period, kept
            checked.extend(name for name in before if name not in trains and before[name].any())
        seen.append(frozenset(trains))

    trainer = run(
        model, tmp_path, 9, optimizer="default", decay=0.1, before=[Hook(on_step_begin=begin)],
        after=[Hook(on_step_end=look)],
    )  # fmt: skip
    assert checked
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[5]
    assert len(set(seen)) == 3
    records = trainer.schedule_callbacks[0].events
    assert [record["step"] for record in records] == [0, 3, 6]
    assert all(0.45 <= record["fraction"] <= 0.55 for record in records)
    assert all(p.requires_grad for name, p in model.named_parameters() if "sparse_lora_values" in name)


def test_a_period_is_an_epoch_by_default_and_the_next_run_trains_all_again(tmp_path):
    model = get_peft_model(tiny_llama(), methods.get("hft", task_type="CAUSAL_LM").config)
    data = TokenData(samples=16)
    for _ in range(2):
        trainer = run(model, tmp_path, 6, optimizer="default", data=data, batch=4, accumulation=2)
        assert [record["step"] for record in trainer.schedule_callbacks[0].events] == [0, 2, 4]


def test_the_seed_and_the_step_decide_and_nothing_else(tmp_path):
    config = methods.get("hft", period_steps=2, task_type="CAUSAL_LM").config
    records = []
    for seed in (0, 0, 1):
        torch.manual_seed(100 + len(records))
        model = get_peft_model(tiny_llama(), copy.deepcopy(config))
        model.peft_config["default"].seed = seed
        trainer = run(model, tmp_path, 4, optimizer="default")
        records.append([record["trains"] for record in trainer.schedule_callbacks[0].events])
    assert records[0] == records[1] != records[2]


def test_resumed_inside_a_period_and_at_its_border_to_the_last_bit(tmp_path):
    config = methods.get("hft", period_steps=3, task_type="CAUSAL_LM").config

    def course(**options):
        last = {}
        model = get_peft_model(tiny_llama(layers=2), copy.deepcopy(config))
        hook = Hook(on_step_end=lambda update, m, o: last.update(all_state(m, o)) if update == 7 else None)
        run(model, tmp_path, 7, optimizer="default", after=[hook], save_steps=1, save_strategy="steps", **options)
        return last

    whole = course()
    for stop in (3, 4):
        assert differences(whole, course(resume=str(tmp_path / f"checkpoint-{stop}"))) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period_steps": 50}, r"AlternateModules.period_steps=50 is more than the run's 4 steps"),
        ({"categories": {"attention": ["q_proj"]}}, r"no category for '.*k_proj'"),
        ({"fraction": 1.0}, r"AlternateModules.fraction=1.0 is out of range"),
    ],
)
def test_periods_that_cannot_be_are_refused(tmp_path, options, message):
    schedule = [{"type": "alternate_modules", **options}]
    with pytest.raises(ValueError, match=message):
        run(get_peft_model(tiny_llama(), methods.get("hft", schedule=schedule).config), tmp_path, 4)


def test_a_frozen_start_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), methods.get("hft", period_steps=2).config)
    layers_of(model)[0].sparse_lora_values["default"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"is frozen at the start.*set_adapter\('default'\)"):
        run(model, tmp_path, 4, optimizer="default")


OTHERS = {
    "lora": lambda: LoraConfig(r=2, target_modules=[*ATTENTION, *FFN], task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=[*ATTENTION, *FFN], task_type="CAUSAL_LM"),
    "kernel": lambda: KernelLoraConfig(r=2, target_modules=[*ATTENTION, *FFN], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_modules_of_every_tuner_take_turns(kind, tmp_path):
    """Given to a callback, the rule reaches upstream's layers; each module outside the chosen keeps every bit."""
    torch.manual_seed(0)
    model, seen, before = get_peft_model(mha(), OTHERS[kind]()), [], {}
    runner = RuleRunner(AlternateModules(period_steps=2))

    def numbers():
        return {n: p.detach().clone() for n, p in model.named_parameters() if "lora" in n}

    def begin(update, model, optimizer):
        before.update(numbers())

    def look(update, model, optimizer):
        after = numbers()
        moved = {n.split(".kernel_lora_")[0].split(".lora_")[0] for n in after if not torch.equal(after[n], before[n])}
        seen.append({name.removeprefix("base_model.model.") for name in moved})

    run(
        model, tmp_path, 6, optimizer="default", decay=0.1, callbacks=[runner], before=[Hook(on_step_begin=begin)],
        after=[Hook(on_step_end=look)],
    )  # fmt: skip
    assert [event["step"] for event in runner.events] == [0, 2, 4]
    assert [set(runner.events[step // 2]["trains"]) for step in range(6)] == seen
    assert set().union(*seen) == {name.replace("base_model.model.", "") for name in names_of(2)}
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
