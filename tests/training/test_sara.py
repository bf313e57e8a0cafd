"""SaRA: the smallest weights train, a nuclear norm pulls them to low rank, those that outgrow the threshold freeze."""

import pytest
import torch
from training_toolbox import (
    Hook,
    StopAt,
    adapted,
    all_state,
    differences,
    layers_of,
    make_config,
    moves_of,
    run,
    snapshot,
    support_of,
    tiny_llama,
)
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_sparse_peft import BelowThreshold, NuclearNorm, Regrow, methods
from hf_sparse_peft.tuners.sparse_lora.spaces import SupportSpace

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 12  # the adjustment takes the place of step 6


def method(**options):
    return methods.get("sara", **{"min_side": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


def base_of(model):
    return {layer.module_name: layer.dense_base_weight().detach().double().clone() for layer in layers_of(model)}


def train(model, out, steps=STEPS, lr=2e-2, **options):
    return run(model, out, steps, lr=lr, optimizer="default", decay=0.01, batch=2, **options)


def test_the_support_is_the_smallest_share_or_everything_below_the_threshold():
    for options in ({"density": 0.1}, {"threshold": 0.01}):
        model = adapted(method(**options).config)
        for layer in layers_of(model):
            flat = layer.dense_base_weight().abs().reshape(-1)
            count = int(0.1 * flat.numel()) if "density" in options else int((flat < 0.01).sum())
            order = sorted(range(flat.numel()), key=lambda i: (float(flat[i]), i))
            assert support_of(layer) == sorted(order[:count])
    assert model.peft_config["default"].sizes.keys() == {layer.module_name for layer in layers_of(model)}


def test_a_fresh_adapter_gives_the_bases_output_bit_for_bit():
    # The official optimizer starts from absolute values: negative small weights would flip here.
    ids = torch.arange(18).view(2, 9)
    base = tiny_llama(0).eval()
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        assert torch.equal(adapted(method().config).eval()(input_ids=ids).logits, plain)


def test_the_nuclear_norms_gradient_is_autograds_through_the_singular_values():
    model = adapted(method(density=0.4).config, seed=3)
    for layer in layers_of(model):
        values = layer.sparse_lora_values["default"]
        values.data.normal_(std=0.1)
        values.grad = torch.zeros_like(values)
        NuclearNorm().add_gradient(SupportSpace(layer, "default"), scale=2.0)
        at = support_of(layer)
        deltas = values.detach().double().requires_grad_()
        masked = torch.zeros(layer.out_features * layer.in_features, dtype=torch.float64)
        current = layer.dense_base_weight().detach().double().reshape(-1)[at] + deltas
        masked = masked.index_put((torch.tensor(at),), current).view(layer.out_features, layer.in_features)
        (5e-4 * torch.linalg.svdvals(masked).sum()).backward()
        torch.testing.assert_close(values.grad.double(), 2.0 * deltas.grad, rtol=1e-4, atol=1e-8)
        assert deltas.grad.abs().max() > 1e-5


@pytest.mark.parametrize("accumulation", [1, 3])
def test_one_matrix_a_step_gets_the_nuclear_norm_once_whatever_the_accumulation(accumulation, tmp_path):
    model = adapted(method(nuclear_weight=0.5).config)
    before, changed = {}, []

    def keep(update, model, optimizer):
        before.update({layer: layer.sparse_lora_values["default"].grad.clone() for layer in layers_of(model)})

    def compare(update, model, optimizer):
        hit = []
        for layer in layers_of(model):
            gradient = layer.sparse_lora_values["default"].grad
            if gradient is None:
                continue
            added = gradient - before[layer]
            if added.any():
                hit.append(layer.module_name)
                assert added.norm() <= 0.5 * min(layer.in_features, layer.out_features) ** 0.5 + 1e-4
        changed.append(hit)

    train(
        model, tmp_path, accumulation=accumulation, before=[Hook(on_pre_optimizer_step=keep)],
        after=[Hook(on_pre_optimizer_step=compare)],
    )  # fmt: skip
    others = changed[:5] + changed[6:]
    assert changed[5] == []  # the adjustment's step has no update
    assert all(len(hit) == 1 for hit in others)
    assert len({hit[0] for hit in others}) > 1


@pytest.mark.parametrize("threshold", [None, 0.01])
def test_half_way_entries_past_the_threshold_freeze_and_the_others_start_afresh(threshold, tmp_path):
    model = adapted(method(threshold=threshold).config, seed=2)
    base, sides = base_of(model), {}

    def take(name):
        def look(update, model, optimizer):
            marks = [layer.sparse_lora_rule_frozen["default"].clone() for layer in layers_of(model)]
            sides[name, update] = list(zip(snapshot(model, optimizer), marks, strict=True))

        return look

    trainer = train(
        model, tmp_path, before=[Hook(on_pre_optimizer_step=take("step"), on_step_end=take("old"))],
        after=[Hook(on_step_end=take("new"))],
    )  # fmt: skip
    (record,) = moves_of(trainer, "freeze")
    assert record["step"] == 6
    frozen_ever = alive_ever = 0
    for number, layer in enumerate(layers_of(model)):
        (stepped, _), (old, none), (new, marks) = (sides[key][number] for key in (("step", 6), ("old", 6), ("new", 6)))
        assert not none.any()
        assert torch.equal(stepped["values"], old["values"])  # no update at the adjustment's step
        assert torch.equal(old["values"], new["values"])
        assert old["units"] == new["units"]
        weight = base[layer.module_name].reshape(-1)[old["units"]]
        current = (weight + old["values"].double()).abs()
        past = current >= threshold if threshold else current > weight.abs().max()
        assert torch.equal(marks.bool(), past)  # M1 is a part of M0: whoever is not past it
        assert new["state"] == {}  # restarts from zero, its step count too
        end = sides["old", STEPS][number][0]
        assert end["units"] == old["units"]  # entries outside M0 never change
        assert torch.equal(end["values"][past], old["values"][past])
        assert (end["values"][~past] != old["values"][~past]).all()
        assert sum(t.numel() for k, t in end["state"].items() if k != "step") == 2 * len(old["units"])
        assert int(end["state"]["step"]) == STEPS - 6
        assert not any(end["state"][key][past].any() for key in ("exp_avg", "exp_avg_sq"))
        frozen_ever += int(past.sum())
        alive_ever += int((~past).sum())
    assert (record["frozen"], record["alive"]) == (frozen_ever, alive_ever)
    assert frozen_ever > 0
    assert alive_ever > 0


@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_changes_no_bit(stop, tmp_path):
    def finish(out, **options):
        last = {}

        def look(update, model, optimizer):
            if update == STEPS:
                last.update(all_state(model, optimizer))

        train(adapted(method().config), out, after=[Hook(on_step_end=look)], **options)
        return last

    whole = finish(tmp_path / "whole")
    train(adapted(method().config), tmp_path / "parts", after=[StopAt(stop)])
    resumed = finish(tmp_path / "parts", resume=str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert any("frozen" in name and tensor.any() for name, tensor in whole.items())
    assert differences(whole, resumed) == []


def test_it_trains_on_an_nf4_base_by_the_dequantised_weights(tmp_path):
    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    model = adapted(method(density=0.2).config, base=base)
    marks = {}

    def look(update, model, optimizer):
        marks.update({layer: layer.sparse_lora_rule_frozen["default"].clone() for layer in layers_of(model)})

    train(model, tmp_path, before=[Hook(on_step_end=look)])
    for layer, mark in marks.items():
        assert 0 < int(mark.sum()) < mark.numel()
        assert layer.sparse_lora_values["default"].any()


def test_contradictions_are_refused_with_the_mend(tmp_path):
    with pytest.raises(ValueError, match=r"Freeze needs the units.*Regrow moves them"):
        make_config(schedule=[Regrow(), {"type": "freeze", "at": 0.5}])
    with pytest.raises(ValueError, match=r"NuclearNorm.*granularity='row'"):
        make_config(schedule=[NuclearNorm(0.1)], granularity="row")
    with pytest.raises(ValueError, match=r"BelowThreshold.*criterion='smallest_magnitude'"):
        make_config(budget=BelowThreshold(1e-3))
    with pytest.raises(ValueError, match=r"Freeze.at=1.0"):
        make_config(schedule=[{"type": "freeze", "at": 1.0}])
    with pytest.raises(ValueError, match=r"threshold=1e-09 leaves no entry in '.*Raise it"):
        adapted(method(threshold=1e-9).config)
    with pytest.raises(ValueError, match=r"Freeze.at=0.5.*2 steps.*Train longer"):
        train(adapted(method().config), tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"min_side=64 leaves no matrix"):
        train(adapted(method(min_side=64).config), tmp_path)
