"""LT-SFT's pull to the start in the second phase: its gradient from the formula, once per optimizer step."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from training_toolbox import (
    Hook,
    StopAt,
    adapted,
    all_state,
    differences,
    layers_of,
    make_config,
    run,
    support_of,
    tiny_llama,
)
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_sparse_peft import Freeze, L1Penalty, SparseLoraConfig, callbacks_for, methods
from hf_sparse_peft.rules import Run, Training
from hf_sparse_peft.rules.penalties import model_numel
from hf_sparse_peft.training import RuleRunner

WEIGHT = 900.0  # P is about 10 000


def config(**overrides):
    return make_config(**{"schedule": [L1Penalty(WEIGHT)], "modules_to_save": ["lm_head"], **overrides})


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def additions(model, out, **options):
    """What callbacks add to gradients: `(parameters, added)` of every step."""
    before, steps = {}, []

    def keep(update, model, optimizer):
        before.update({name: p.grad.clone() for name, p in trained(model).items()})

    def compare(update, model, optimizer):
        found = trained(model)
        values = {name: p.detach().clone() for name, p in found.items()}
        steps.append((values, {name: p.grad.double() - before[name].double() for name, p in found.items()}))

    hooks = {"before": [Hook(on_pre_optimizer_step=keep)], "after": [Hook(on_pre_optimizer_step=compare)]}
    run(model, out, 4, decay=0.0, **hooks, **options)
    return steps


@pytest.mark.parametrize("scope", ["trained", "support"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_gradient_of_the_formula_is_added_once_a_step_whatever_the_accumulation(accumulation, scope, tmp_path):
    model = adapted(config(schedule=[L1Penalty(WEIGHT, scope)]))
    start = {name: p.detach().double().clone() for name, p in trained(model).items()}
    assert sum("modules_to_save" in name for name in start) == 1
    numbers = sum(p.numel() for p in tiny_llama().parameters())
    steps = additions(model, tmp_path, accumulation=accumulation, batch=2)
    assert len(steps) == 4
    for values, added in steps:
        for name, value in values.items():
            point = value.double().requires_grad_()
            (WEIGHT / numbers * (point - start[name]).abs().sum()).backward()
            pulled = scope == "trained" or "modules_to_save" not in name
            torch.testing.assert_close(added[name], point.grad if pulled else 0 * point.grad, rtol=0, atol=1e-6)
    assert all(steps[-1][0][name].ne(start[name]).any() for name in start)


def test_units_that_are_frozen_or_dead_are_not_pulled():
    model = adapted(config(schedule=[L1Penalty(WEIGHT), Freeze(at=0.5)], modules_to_save=None))
    runner = RuleRunner()
    runner.begin(Training(model=model, total_steps=9), {})
    for layer in layers_of(model):
        values = layer.sparse_lora_values["default"]
        values.data.normal_()
        values.grad = torch.zeros_like(values)
        layer.sparse_lora_rule_frozen["default"][::2] = 1
    runner.gradients()
    runner.leave()
    for layer in layers_of(model):
        gradient = layer.sparse_lora_values["default"].grad
        assert not gradient[::2].any()
        assert gradient[1::2].all()


def test_a_scaled_support_is_pulled_by_what_it_changes_in_the_weight(tmp_path):
    model = adapted(config(r=4, lora_alpha=12, scale_support=True, modules_to_save=None))
    numbers = sum(p.numel() for p in tiny_llama().parameters())
    values, added = additions(model, tmp_path)[-1]
    for name, value in values.items():
        expected = 3.0 * WEIGHT / numbers * value.double().sign() if "values" in name else 0 * value.double()
        torch.testing.assert_close(added[name], expected, rtol=0, atol=1e-6)


def test_a_heavy_pull_keeps_the_changes_small(tmp_path):
    reach = []
    for weight in (0.0, 1e9):
        method = methods.get(
            "lt-sft", l1=weight, warmup_steps=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        model = adapted(method.config)
        run(model, tmp_path, 40, lr=1e-3, decay=0.0, callbacks=method.callbacks(model), lr_scheduler_type="constant")
        reach.append(
            max(float(layer.sparse_lora_values["default"].detach().abs().mean()) for layer in layers_of(model))
        )
    assert reach[1] < 0.15 * reach[0]


def test_a_resumed_run_with_a_pulled_head_changes_no_bit(tmp_path):
    def finish(out, **options):
        last = {}

        def look(update, model, optimizer):
            if update == 8:
                last.update(all_state(model, optimizer))

        run(adapted(config()), out, 8, after=[Hook(on_step_end=look)], **options)
        return last

    whole = finish(tmp_path / "whole")
    run(adapted(config()), tmp_path / "parts", 8, after=[StopAt(4)])
    resumed = finish(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-4"))
    assert differences(whole, resumed) == []


def test_gradients_under_fp16_are_pulled_in_their_own_scale():
    def scale(loss_scale, clips):
        training = Training(model=None, total_steps=1, loss_scale=loss_scale, clips=clips)
        return Run(training, L1Penalty(), "default", None, []).gradient_scale

    assert scale(512.0, clips=False) == 512.0
    assert scale(512.0, clips=True) == 1.0  # clipping unscaled them
    assert scale(1.0, clips=False) == 1.0


def test_p_counts_every_number_of_the_model_and_nothing_of_adapters(tmp_path):
    numbers = sum(p.numel() for p in tiny_llama().parameters())
    assert model_numel(adapted(config())) == numbers
    tiny_llama().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, device_map="cpu", dtype=torch.float32)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert model_numel(get_peft_model(base, config(target_modules=every, modules_to_save=None))) == numbers


def test_the_config_tells_both_penalties_and_survives_json(tmp_path):
    method = methods.get("lt-sft", warmup_l1=0.1, l1=0.2, target_modules=["q_proj"])
    assert method.config.criterion.l1 == 0.1
    method.config.save_pretrained(tmp_path)
    read = SparseLoraConfig.from_pretrained(tmp_path)
    assert (read.schedule, read.compact_tolerance) == ([L1Penalty(0.2, "trained")], 1e-7)
    assert [type(callback) for callback in callbacks_for(read)] == [RuleRunner]
    assert methods.get("lt-sft").config.schedule == []


def test_pulls_without_a_known_start_are_refused_with_the_mend():
    with pytest.raises(ValueError, match=r"L1Penalty.*bias='all'.*scope='support'"):
        config(bias="all")
    config(bias="all", schedule=[L1Penalty(1.0, "support")])
    with pytest.raises(ValueError, match=r"L1Penalty.*support_init='uniform'"):
        config(support_init="uniform")
    with pytest.raises(ValueError, match=r"L1Penalty.*density=0"):
        config(density=0, r=4)
    with pytest.raises(ValueError, match=r"L1Penalty.weight=0.0"):
        L1Penalty(weight=0.0)
    with pytest.raises(ValueError, match=r"compact_tolerance=-1"):
        config(compact_tolerance=-1)


@pytest.mark.parametrize("granularity", ["entry", "row"])
def test_compact_drops_changes_within_the_limit_and_nothing_else(granularity, tmp_path):
    model = adapted(make_config(granularity=granularity, density=0.2, compact_tolerance=1e-7))
    kept = {}
    for layer in layers_of(model):
        values = layer.sparse_lora_values["default"].data
        values.uniform_(-1e-7, 1e-7)
        flat = values.view(len(values), -1)
        flat[::3, 0], flat[1::3, -1] = 2e-7, -5.0
        flat[2::3, 0] = 1e-7  # the limit itself goes
        units = torch.tensor(support_of(layer))
        kept[layer.module_name] = units[torch.arange(len(units)) % 3 != 2].tolist()
    expected = {layer.module_name: layer.get_delta_weight("default") for layer in layers_of(model)}
    model.compact()
    for layer in layers_of(model):
        assert support_of(layer) == kept[layer.module_name]
        change = layer.get_delta_weight("default") - expected[layer.module_name]
        assert 0 < change.abs().max() <= 1e-7
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    for one, two in zip(layers_of(model), layers_of(loaded), strict=True):
        assert torch.equal(one.get_delta_weight("default"), two.get_delta_weight("default"))


def test_compact_keeps_zeros_unless_told_otherwise():
    model = adapted(make_config())
    before = [support_of(layer) for layer in layers_of(model)]
    model.compact()
    assert [support_of(layer) for layer in layers_of(model)] == before
    for layer in layers_of(model):
        layer.sparse_lora_values["default"].data[::2] = 1.0
    model.compact(compact_tolerance=0.0)
    assert [support_of(layer) for layer in layers_of(model)] == [units[::2] for units in before]
