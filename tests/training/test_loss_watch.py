"""A loss that is not finite names its step and the layer that it comes from, once, before all weights are NaN."""

import logging

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import Prune, SparseLoraConfig, SupportTelemetryCallback, callbacks_for
from hf_sparse_peft.tuners import adapter_layers

WATCHERS = ["runner", "telemetry", "both"]


def a_model(**options):
    config = SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj", "up_proj"], **options)
    return get_peft_model(tiny.llama(), config)


def run(watcher, out, hooks=(), **options):
    schedule = [Prune(final_fraction=0.9, start=0.0, end=1.0, every=1)] if watcher != "telemetry" else []
    model = a_model(schedule=schedule)
    callbacks = [*hooks, *callbacks_for(model), *([SupportTelemetryCallback()] if watcher != "runner" else [])]
    tiny.train(model, out, 6, callbacks=callbacks, **options)
    return model


def spoils(module_name, at, value=float("inf")):
    """From step `at` on the module of that name puts one `value` into its output."""
    step = [0]

    def begin(number, model, optimizer):
        step[0] = number
        if number == at:
            module = model.get_submodule(f"base_model.model.{module_name}")
            module.register_forward_hook(lambda m, args, out: out.index_fill(-1, torch.tensor([3]), value))

    return tiny.At(on_step_begin=begin)


@pytest.mark.parametrize("watcher", WATCHERS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_and_first_layer_are_named(watcher, accumulation, tmp_path):
    hooks = [spoils("model.layers.1.mlp.up_proj", at=3)]
    with pytest.raises(
        ValueError, match=r"Step 3: the loss is nan\. 'model\.layers\.1\.mlp\.up_proj' is the first layer"
    ):
        run(watcher, tmp_path, hooks, gradient_accumulation_steps=accumulation)


def test_a_module_that_is_not_adapted_is_named_too(tmp_path):
    with pytest.raises(ValueError, match=r"Step 2.*'model\.layers\.0\.mlp\.down_proj' is.*its input is finite"):
        run("runner", tmp_path, [spoils("model.layers.0.mlp.down_proj", at=2)])


def test_values_that_an_earlier_update_spoiled_are_named_and_not_what_follows_from_them(tmp_path):
    def spoil(step, model, optimizer):
        if step == 2:
            adapter_layers(model)[1].sparse_lora_values["default"].data[0] = float("nan")

    with pytest.raises(ValueError, match=r"Step 3.*Trained values of 'model\.layers\.0\.mlp\.up_proj'.*earlier step"):
        run("telemetry", tmp_path, [tiny.At(on_step_end=spoil)])


def test_labels_that_are_all_masked_are_said_and_end_nothing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = run("telemetry", tmp_path, data=tiny.TokenData(masked=True))
    said = [record.message for record in caplog.records if "Step" in record.message]
    assert len(said) == 1
    assert said[0].startswith("Step 1: the loss is nan. All labels of the batch are masked (-100)")
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_that_is_left_out_ends_nothing(tmp_path):
    def leave_out(step, model, optimizer):
        if step == 3:
            for parameter in model.parameters():
                parameter.grad = None

    def once(step, model, optimizer):
        if step == 4:
            model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")._forward_hooks.clear()

    hooks = [spoils("model.layers.1.mlp.up_proj", at=3), tiny.At(on_pre_optimizer_step=leave_out, on_step_begin=once)]
    model = run("telemetry", tmp_path, hooks)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("watcher", WATCHERS)
def test_watching_draws_no_random_number_and_leaves_no_hook(watcher, tmp_path):
    model = run(watcher, tmp_path)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_after_the_error_the_model_has_no_hook_of_the_watch(tmp_path):
    model = a_model()
    hooks = [spoils("model.layers.1.mlp.up_proj", at=2)]
    with pytest.raises(ValueError, match="Step 2"):
        tiny.train(model, tmp_path, 4, callbacks=[*hooks, SupportTelemetryCallback()])
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
