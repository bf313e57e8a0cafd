"""Frozen units keep every bit under every optimizer; kept, new and frozen units through moves, files and a resume."""

import warnings

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training_toolbox import (
    Hook,
    StopAt,
    adapted,
    all_state,
    differences,
    layers_of,
    make_config,
    run,
    snapshot,
    support_of,
    tiny_llama,
)
from transformers.optimization import Adafactor

from hf_sparse_peft import Random, Regrow
from hf_sparse_peft.optim import AgedAdamW, aged_adamw_groups, use_32bit_states
from hf_sparse_peft.training import SparseSM3Spec
from hf_sparse_peft.training.optimizers import settings_of


def values_of(model):
    return [p for name, p in model.named_parameters() if p.requires_grad and "sparse_lora_values" in name]


def aged(model, args):
    return AgedAdamW(aged_adamw_groups(model, lambda name, _: "values" in name, 0.5), lr=1e-2)


def eight_bit(model, args):
    use_32bit_states(values_of(model))
    return bnb.optim.AdamW8bit(values_of(model), lr=1e-2, weight_decay=0.5)


OPTIMIZERS = {
    "adamw": lambda m, a: torch.optim.AdamW(values_of(m), lr=1e-2, weight_decay=0.5, foreach=False),
    "adamw-fused": lambda m, a: torch.optim.AdamW(values_of(m), lr=1e-2, weight_decay=0.5, fused=True),
    "aged-adamw": aged,
    "bnb-adamw-8bit-with-override": eight_bit,
    "adafactor": lambda m, a: Adafactor(values_of(m), lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
    "sparse-sm3": lambda m, a: SparseSM3Spec(momentum=0.9).build(m, settings_of(a)),
    "sgd-momentum": lambda m, a: torch.optim.SGD(values_of(m), lr=1e-1, momentum=0.9, weight_decay=0.5),
    "bnb-lion-32bit": lambda m, a: bnb.optim.Lion32bit(values_of(m), lr=1e-3, weight_decay=0.5),
}
# More than 4096 values, or bitsandbytes would take 32-bit states by itself.
BIG = {"density": 0.3, "target_modules": ["down_proj"]}


def moving(**overrides):
    rule = {"every": 3, "fraction": 0.4, "grow": "random", "retired": 0.7, **overrides}
    return make_config(**BIG, schedule=[Regrow(**rule)])


def train(model, make, out, steps=14, **options):
    trainer = run(model, out, steps, train=False, decay=0.5, batch=2, **options)
    trainer.optimizer = make(model, trainer.args)
    trainer.train(resume_from_checkpoint=options.pop("resume", None))
    return trainer


def split(side, frozen):
    marks = frozen[: len(side["units"])].bool().tolist()
    pairs = list(zip(side["units"], marks, strict=True))
    return [unit for unit, mark in pairs if not mark], [unit for unit, mark in pairs if mark]


class Sides:
    def __init__(self):
        self.old, self.new, self.marks = {}, {}, {}
        self.before, self.after = [Hook(on_step_end=self.look(self.old))], [Hook(on_step_end=self.look(self.new))]

    def look(self, into):
        def take(update, model, optimizer):
            layer = layers_of(model)[0]
            into[update] = (*snapshot(model, optimizer), layer.sparse_lora_rule_frozen["default"].clone())

        return take


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moves_and_frozen_units_under_every_optimizer(name, tmp_path):
    model = adapted(moving(), hidden=64)
    assert values_of(model)[0].numel() >= 4096
    sides = Sides()
    trainer = train(model, OPTIMIZERS[name], tmp_path, before=sides.before, after=sides.after)
    moves = [3, 6, 9, 12]
    assert [move["step"] for move in trainer.schedule_callbacks[0].events] == moves
    thawed_ever = retired_ever = 0
    for update in moves:
        (old, old_marks), (new, new_marks) = sides.old[update], sides.new[update]
        trained, retired = split(old, old_marks)
        now, now_retired = split(new, new_marks)
        assert len(now) == len(trained) == int(0.3 * 64 * 128)
        value = dict(zip(new["units"], new["values"].tolist(), strict=False))
        before = dict(zip(old["units"], old["values"].tolist(), strict=False))
        for unit in now_retired:  # who leaves or is retired keeps its value
            assert value[unit] == before[unit] != 0
        thawed = set(now) & set(retired)
        assert all(value[u] == before[u] for u in thawed)
        fresh = set(now) - set(trained) - thawed
        assert fresh
        assert all(value[u] == 0 for u in fresh)
        kept = sorted(set(now) & set(trained))
        assert all(value[u] == before[u] for u in kept)
        for key, state in new["state"].items():
            if not isinstance(state, torch.Tensor) or state.shape[:1] != new["values"].shape[:1]:
                continue
            places = [{unit: place for place, unit in enumerate(side["units"])} for side in (new, old)]
            at, was = ([place[u] for u in kept] for place in places)
            assert torch.equal(state[at], old["state"][key][was]), key
            restarted = [places[0][u] for u in [*fresh, *thawed, *now_retired]]
            assert not state[restarted].any(), key
        thawed_ever += len(thawed)
        retired_ever += len(set(now_retired) - set(retired))
        # Until the next move frozen values stand still to the last bit, and the others train.
        (last, marks), end = sides.old[min(update + 3, 13)], new["units"]
        assert last["units"] == end
        still = marks[: len(end)].bool()
        assert torch.equal(last["values"][: len(end)][still], new["values"][: len(end)][still])
        assert (last["values"][: len(end)][~still] != new["values"][: len(end)][~still]).float().mean() > 0.9
    assert thawed_ever > 0
    assert retired_ever > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_frozen_units_resumes_bit_for_bit(name, tmp_path):
    def finish(out, resume=None):
        last = {}

        def look(update, model, optimizer):
            if update == 8:
                last.update(all_state(model, optimizer))

        model = adapted(moving(every=2), hidden=64)
        trainer = run(model, out, 8, train=False, decay=0.5, batch=2, after=[Hook(on_step_end=look)])
        trainer.optimizer = OPTIMIZERS[name](model, trainer.args)
        trainer.train(resume_from_checkpoint=resume)
        return last

    whole = finish(tmp_path / "whole")
    train(adapted(moving(every=2), hidden=64), OPTIMIZERS[name], tmp_path / "parts", 8, after=[StopAt(5)])
    resumed = finish(tmp_path / "parts", str(tmp_path / "parts" / "checkpoint-5"))
    assert whole["model." + next(k for k in whole if "sparse_lora_rule_frozen" in k)[6:]].any()
    assert differences(whole, resumed) == []


def finished(tmp_path, **overrides):
    model = adapted(moving(**overrides), hidden=64)
    seen = {}

    def look(update, model, optimizer):
        seen["trainable"] = model.get_nb_trainable_parameters()
        seen["frozen"] = int(layers_of(model)[0].sparse_lora_rule_frozen["default"].sum())

    trainer = train(model, aged, tmp_path / "run", after=[Hook(on_step_end=look)])
    return model, trainer, seen


def test_frozen_units_are_not_counted_as_trainable_and_ship_as_ordinary_ones(tmp_path):
    model, trainer, seen = finished(tmp_path)
    trained = int(0.3 * 64 * 128)
    assert seen["frozen"] > 0
    assert seen["trainable"][0] == trained
    layer = layers_of(model)[0]
    living = len(support_of(layer))
    assert living == trained + seen["frozen"]
    ids = torch.arange(18).view(2, 9)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        trainer.save_model(str(tmp_path / "whole"))
        assert not any("frozen" in key for key in load_file(tmp_path / "whole" / "adapter_model.safetensors"))
        loaded = PeftModel.from_pretrained(tiny_llama(hidden=64), str(tmp_path / "whole")).eval()
        assert torch.equal(loaded(input_ids=ids).logits, logits)
        model.compact()
        assert all(units == capacity for units, capacity, _ in model.peft_config["default"].sizes.values())
        assert layer.sparse_lora_values["default"].shape[0] == living
        model.save_pretrained(str(tmp_path / "compact"))
        loaded = PeftModel.from_pretrained(tiny_llama(hidden=64), str(tmp_path / "compact")).eval()
        assert torch.equal(loaded(input_ids=ids).logits, logits)
        base = {k: v.clone() for k, v in model.state_dict().items() if "sparse_lora" not in k}
        model.merge_adapter()
        merged = model(input_ids=ids).logits
        assert torch.allclose(merged, logits, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in base.items())


def test_when_the_room_is_full_the_smallest_changes_are_lost_counted_and_warned_of_once(tmp_path):
    model, sides = adapted(moving(retired=0.1), hidden=64), Sides()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(model, aged, tmp_path, before=sides.before, after=sides.after)
    assert len([w for w in caught if "room for retired units is full" in str(w.message)]) == 1
    trained = int(0.3 * 64 * 128)
    room = int(0.1 * trained)
    assert layers_of(model)[0].sparse_lora_values["default"].shape[0] == trained + room
    for move in trainer.schedule_callbacks[0].events:
        assert move["retired"] == room
        assert move["lost"] > 0
        (old, _), (new, marks) = sides.old[move["step"]], sides.new[move["step"]]
        now, retired = split(new, marks)
        change = dict(zip(old["units"], old["values"].abs().tolist(), strict=False))
        gone = set(old["units"]) - set(now) - set(retired)
        assert len(gone) == move["lost"]
        assert max(change[u] for u in gone) <= min(change[u] for u in retired)


def test_blocks_retire_whole(tmp_path):
    rule = Regrow(every=3, grow=Random(), fraction=0.6, retired=0.5)
    model = adapted(make_config(granularity="block", density=0.25, schedule=[rule]))
    trainer = run(model, tmp_path, 8)
    assert trainer.schedule_callbacks[0].events[-1]["retired"] > 0
    for layer in layers_of(model):
        living = len(support_of(layer))
        assert living > layer.sizes["default"].units
        assert layer.sparse_lora_values["default"][:living].abs().sum((1, 2)).min() > 0


def test_capacity_never_exceeds_the_weight():
    rule = Regrow(every=3, grow=Random(), retired=5.0)
    model = adapted(make_config(density=0.5, schedule=[rule]))
    for layer in layers_of(model):
        assert layer.sparse_lora_values["default"].shape[0] == layer.in_features * layer.out_features
        assert len(support_of(layer)) == layer.in_features * layer.out_features // 2


def test_pruning_and_retiring_contradict_each_other():
    with pytest.raises(ValueError, match="Prune takes units away"):
        make_config(schedule=[{"type": "prune", "start": 0.1}, Regrow(grow=Random(), retired=1.0)])
