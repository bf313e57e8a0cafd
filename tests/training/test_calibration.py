"""Calibration of any tuner: statistics of base weights against plain autograd, and a tuner that starts from them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from hf_sparse_peft import Controller, calibrate, callbacks_for
from hf_sparse_peft.rules.calibration_data import CalibrationData
from hf_sparse_peft.rules.probing import random_state_kept
from hf_sparse_peft.sparsity import Activation, Fisher, MeanGradient, Momentum, Statistic
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.training.calibration import read_statistics, start
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared import (
    AdapterConfig,
    AdapterLayer,
    AdapterModel,
    AdditiveLinear,
    LowRank,
    register_tuner,
)
from hf_sparse_peft.utils.tensors import TensorSpec

TARGETS = {"conv1d": ["c_attn", "c_fc"]}


@dataclass
class GradientCoreConfig(AdapterConfig):
    """A trained core between the leading singular vectors of the mean gradient."""

    tuner: ClassVar[str] = "gradient_core"
    r: int = 4

    @property
    def needs_calibration(self) -> bool:
        return True


class GradientCoreLayer(AdapterLayer):
    prefix = "gradient_core_"
    gradient_core_U: BufferDict
    gradient_core_V: BufferDict
    gradient_core_C: nn.ParameterDict
    without: ClassVar[list[str]] = []

    @classmethod
    def tensor_specs(cls, config, module_name, rows, cols, sizes):
        return [
            TensorSpec("gradient_core_U", (rows, config.r), role="saved"),
            TensorSpec("gradient_core_V", (config.r, cols), role="saved"),
            TensorSpec(
                "gradient_core_C", (config.r, config.r), start=lambda generator: torch.zeros(config.r, config.r)
            ),
        ]

    def pieces(self, adapter_name):
        U, V = self.gradient_core_U[adapter_name], self.gradient_core_V[adapter_name]
        return [LowRank(U @ self.gradient_core_C[adapter_name], V)]

    def awaits_calibration(self, adapter_name):
        return adapter_name in self.gradient_core_V and not bool(self.gradient_core_V[adapter_name].any())

    def calibration_statistic(self, adapter_name):
        return MeanGradient(examples=16)

    def take_calibration(self, adapter_name, state):
        if state is None:
            self.without.append(self.module_name)
            state = {"mean": torch.eye(self.out_features, self.in_features)}
        U, _, V = torch.linalg.svd(state["mean"], full_matrices=False)
        rank = self.adapter_configs[adapter_name].r
        self.gradient_core_U[adapter_name].copy_(U[:, :rank])
        self.gradient_core_V[adapter_name].copy_(V[:rank])


class GradientCoreLinear(AdditiveLinear, GradientCoreLayer):
    pass


class GradientCoreModel(AdapterModel):
    tuner_layer_cls, linear_cls = GradientCoreLayer, GradientCoreLinear


register_tuner(GradientCoreConfig, GradientCoreModel)


def batches(count=4, size=4, masked=False):
    data = tiny.TokenData(samples=size * count, masked=masked)
    stack = lambda key, at: torch.stack([data[i][key] for i in range(at, at + size)])  # noqa: E731
    return [{key: stack(key, at) for key in ("input_ids", "labels")} for at in range(0, size * count, size)]


def adapted(base=None, **options):
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options}
    return get_peft_model(tiny.llama() if base is None else base, GradientCoreConfig(**options))


def reference(base, data):
    """Gradients of the mean loss over all labelled tokens, by plain autograd in float64, as `[out, in]`."""
    base = copy.deepcopy(base).double().eval()
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in data]
    for batch, count in zip(data, counts, strict=True):
        (base(**batch).loss * count / sum(counts)).backward()
    dense = lambda m: m.weight.grad.t() if type(m).__name__ == "Conv1D" else m.weight.grad  # noqa: E731
    return {
        name: dense(m)
        for name, m in base.named_modules()
        if getattr(m, "weight", None) is not None and m.weight.ndim == 2
    }


def read(model, modules, statistic, data, **options):
    with random_state_kept():
        passes = read_statistics(
            model, modules, statistic, CalibrationData(data, "cpu"), show_progress=False, **options
        )
        return {reader.name: reader for readers in passes for reader in readers}


@pytest.mark.parametrize("kind", ["fp32", "conv1d"])
def test_the_layers_take_the_mean_gradient_of_their_base_weights(kind):
    base, data = tiny.base(kind), batches()
    data[1]["labels"][:, :5] = -100  # batches of other weight
    expected = reference(base, data)
    taken = {}
    model = adapted(base, target_modules=TARGETS.get(kind, ["q_proj", "down_proj"]))
    for layer in adapter_layers(model):
        layer.take_calibration = lambda name, state, layer=layer: taken.update(
            {layer.module_name: state["mean"].clone()}
        )
    calibrate(model, data, show_progress=False)
    assert len(taken) == len(adapter_layers(model))
    for name, mean in taken.items():
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["lora", "plain", "frozen"])
def test_upstream_and_plain_layers_are_read_as_well(kind):
    base, data = tiny.llama(), batches()
    expected = reference(base, data)
    if kind == "frozen":
        base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"])) if kind == "lora" else base
    names = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    modules = {name: model.get_submodule(name) for name in names}
    readers = read(model, modules, MeanGradient(16), data)
    for name in names:
        mean = readers[name].state["mean"].double()
        torch.testing.assert_close(mean, expected[name.removeprefix("base_model.model.")], rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in modules.values())


def test_counts_are_of_tokens_examples_steps_and_tokens_seen():
    base, data = tiny.llama(), batches()
    modules = {"q": base.model.layers[0].self_attn.q_proj}
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in data)
    length = data[0]["input_ids"].shape[1]
    for statistic, count in (
        (Statistic(16), tokens),
        (Fisher(16), 16),
        (Momentum(16), 2),
        (Activation(16), 16 * length),
    ):
        assert read(base, modules, statistic, data, batches_per_step=2)["q"].count == count


def test_a_limit_of_bytes_takes_passes_of_a_layer_each_and_changes_nothing():
    base, data = tiny.llama(), batches()
    modules = {name: module for name, module in base.named_modules() if name.endswith("_proj")}
    whole, parts = (read(base, modules, Statistic(16), data, accumulator_bytes=limit) for limit in (1 << 30, 1))
    assert all(torch.equal(whole[name].state["sum"], parts[name].state["sum"]) for name in modules)


def test_a_layer_that_runs_twice_and_whose_output_is_written_to_is_read_whole():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            y = self.layer(x)
            y.mul_(2).tanh_()
            return {"loss": self.layer(y).square().mean()}

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 6)
    found = read(model, {"layer": model.layer}, Statistic(1), [{"x": x[:1]}])["layer"].state["sum"]
    exact = copy.deepcopy(model).double()
    exact(x[:1].double())["loss"].backward()
    torch.testing.assert_close(found.double(), exact.layer.weight.grad, rtol=1e-5, atol=1e-7)
    squares = read(model, {"layer": model.layer}, Fisher(4), [{"x": x}])["layer"].state["sum"]
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for row in x:
        exact.layer.weight.grad = None
        exact(row[None].double())["loss"].backward()
        expected += exact.layer.weight.grad.square()
    torch.testing.assert_close(squares.double(), expected, rtol=1e-5, atol=1e-8)


def test_an_adapter_that_waits_computes_as_its_base_and_refuses_to_train_and_to_be_saved(tmp_path):
    base, data = tiny.llama().eval(), batches()
    expected = base(**data[0]).logits
    model = adapted(base).eval()
    assert torch.equal(model(**data[0]).logits, expected)
    model.train()
    for act in (lambda: model(**data[0]), lambda: model.save_pretrained(tmp_path), model.compact):
        with pytest.raises(ValueError, match=r"has seen none yet.*calibrate\(model, dataloader\).*callbacks_for"):
            act()
    calibrate(model, data, show_progress=False)
    assert not any(layer.awaits_calibration("default") for layer in adapter_layers(model))
    model(**data[0]).loss.backward()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert not any(layer.awaits_calibration("default") for layer in adapter_layers(again))
    for old, new in zip(adapter_layers(model), adapter_layers(again), strict=True):
        assert torch.equal(old.gradient_core_U["default"], new.gradient_core_U["default"])


def test_data_that_says_nothing_is_refused_and_layers_that_no_batch_reached_are_named(monkeypatch):
    model = adapted()
    with pytest.raises(ValueError, match=r"says nothing about any of the 4 modules.*masked \(-100\)"):
        calibrate(model, batches(masked=True), show_progress=False)
    assert all(layer.awaits_calibration("default") for layer in adapter_layers(model))
    monkeypatch.setattr(GradientCoreLayer, "without", [])
    model.base_model.model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(model, batches(), show_progress=False)
    unreached = [layer.module_name for layer in adapter_layers(model) if ".1." in layer.module_name]
    assert GradientCoreLayer.without == unreached
    said = [str(w.message) for w in caught if "says nothing about 2 of 4" in str(w.message)]
    assert len(said) == 1
    assert all(name in said[0] for name in unreached)


def test_an_adapter_that_does_not_wait_is_left_as_it_is():
    model = adapted()
    calibrate(model, batches(), show_progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, batches(count=2), show_progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="adapter_name='other'"):
        calibrate(model, batches(), "other")


def test_a_trainer_and_a_plain_loop_calibrate_at_the_start_and_a_resumed_run_does_not(tmp_path, monkeypatch):
    def trained(folder, **options):
        model = adapted()
        assert [type(callback) for callback in callbacks_for(model)] == [RuleRunner]
        tiny.train(model, folder, 4, callbacks=callbacks_for(model), save_strategy="steps", save_steps=2, **options)
        return model.state_dict()

    expected = trained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(start, "calibrate", lambda *args, **options: pytest.fail("calibrated again"))
        found = trained(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    model, data = adapted(), batches()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"'MeanGradient' of whole weights.*Controller\(\.\.\., dataloader=\.\.\.\)"):
        Controller(model, optimizer, total_steps=1)
    with Controller(model, optimizer, total_steps=1, dataloader=data) as rules:
        rules.before_step()
        model.train()(**data[0]).loss.backward()
        optimizer.step()
        rules.after_step()
    by_hand = adapted()
    calibrate(by_hand, data, show_progress=False)
    for one, two in zip(adapter_layers(model), adapter_layers(by_hand), strict=True):
        assert torch.equal(one.gradient_core_V["default"], two.gradient_core_V["default"])
        assert one.gradient_core_C["default"].any()
