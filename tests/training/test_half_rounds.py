"""HFT: which half trains in a round, and that the other half rests to the last bit."""

import copy

import pytest
import tiny
import torch
from peft import get_peft_model
from training_toolbox import Hook, TokenData, all_state, differences, layers_of, run, tiny_llama

from hf_sparse_peft import HalfRoundsConfig, methods
from hf_sparse_peft.training.half_rounds import choose_half

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
        chosen = choose_half(HalfRoundsConfig(), names_of(blocks), number, seed=0)
        seen.add(frozenset(chosen))
        counts = []
        for i in range(blocks):
            assert sum(f"layers.{i}.self_attn" in name for name in chosen) == 2
            counts.append(sum(f"layers.{i}.mlp" in name for name in chosen))
        assert set(counts) == {1, 2}
        ffn += counts
    assert sum(ffn) / len(ffn) == 1.5
    assert len(seen) == 8
    assert choose_half(HalfRoundsConfig(), names_of(blocks), 3, 0) in seen
    assert choose_half(HalfRoundsConfig(), names_of(blocks), 3, 1) not in seen


@pytest.mark.parametrize("level", ["block", "model"])
def test_halves_of_blocks_and_models(level):
    chosen = choose_half(HalfRoundsConfig(level=level), names_of(4), 0, 0)
    counts = [sum(f"layers.{i}." in name for name in chosen) for i in range(4)]
    assert sum(counts) == 14
    assert level == "model" or set(counts) == {3, 4}


def mha(layers=2):
    return tiny.llama(layers=layers, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48, vocab_size=48)


def test_the_resting_half_keeps_every_bit_and_no_optimizer_state(tmp_path):
    model = get_peft_model(mha(), methods.get("hft", round_steps=3, task_type="CAUSAL_LM").config)
    before, checked, rounds = {}, [], []

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
                assert int(state[values]["step"]) == (update - 1) % 3 + 1  # fresh at the round's start
            else:
                assert torch.equal(values, before[layer.module_name])
                assert values not in state
        if update > 3:  # learned in an earlier round, kept
            checked.extend(name for name in before if name not in trains and before[name].any())
        rounds.append(frozenset(trains))

    trainer = run(
        model, tmp_path, 9, optimizer="default", decay=0.1, before=[Hook(on_step_begin=begin)],
        after=[Hook(on_step_end=look)],
    )  # fmt: skip
    assert checked
    assert rounds[0] == rounds[1] == rounds[2] != rounds[3] == rounds[5]
    assert len(set(rounds)) == 3
    records = trainer.schedule_callbacks[0].records
    assert [record["step"] for record in records] == [0, 3, 6]
    assert all(0.45 <= record["share"] <= 0.55 for record in records)
    assert all(p.requires_grad for name, p in model.named_parameters() if "sparse_lora_values" in name)


def test_a_round_is_an_epoch_by_default_and_the_next_run_trains_all_again(tmp_path):
    model = get_peft_model(tiny_llama(), methods.get("hft", task_type="CAUSAL_LM").config)
    data = TokenData(samples=16)
    for _ in range(2):
        trainer = run(model, tmp_path, 6, optimizer="default", data=data, batch=4, accumulation=2)
        assert [record["step"] for record in trainer.schedule_callbacks[0].records] == [0, 2, 4]


def test_the_seed_and_the_step_decide_and_nothing_else(tmp_path):
    config = methods.get("hft", round_steps=2, task_type="CAUSAL_LM").config
    records = []
    for seed in (0, 0, 1):
        torch.manual_seed(100 + len(records))
        model = get_peft_model(tiny_llama(), copy.deepcopy(config))
        model.peft_config["default"].seed = seed
        trainer = run(model, tmp_path, 4, optimizer="default")
        records.append([record["trains"] for record in trainer.schedule_callbacks[0].records])
    assert records[0] == records[1] != records[2]


def test_resumed_inside_a_round_and_at_its_border_to_the_last_bit(tmp_path):
    config = methods.get("hft", round_steps=3, task_type="CAUSAL_LM").config

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
        ({"round_steps": 50}, r"rounds.round_steps=50 is more than the run's 4 steps"),
        ({"rounds": {"categories": {"attention": ["q_proj"]}}}, r"no category for '.*k_proj'"),
        ({"rounds": {"fraction": 1.0}}, r"HalfRoundsConfig.fraction=1.0 is out of range"),
    ],
)
def test_rounds_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(get_peft_model(tiny_llama(), methods.get("hft", **options).config), tmp_path, 4, optimizer="default")


def test_a_frozen_start_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), methods.get("hft", round_steps=2).config)
    layers_of(model)[0].sparse_lora_values["default"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"is frozen at the start.*set_adapter\('default'\)"):
        run(model, tmp_path, 4, optimizer="default")
