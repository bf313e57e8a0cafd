"""SoRA's threshold on the gate, against the equation, the released lines and worked numbers."""

import itertools
import warnings

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from training_toolbox import Hook, layers_of, moves_of, run
from transformers import Trainer

from hf_sparse_peft import AdamWSpec, L1Penalty, ProximalGate, SparseLoraConfig, callbacks_for, hub, trainer_options
from hf_sparse_peft.sparsity import dead_zone_threshold, soft_threshold


def adapted(rule: ProximalGate, base: str = "fp32", names=("default",), rules=(), **options):
    torch.manual_seed(2)
    config = SparseLoraConfig(
        r=4,
        density=0.0,
        target_modules=["q_proj", "down_proj"],
        schedule=[rule, *rules],
        task_type="CAUSAL_LM",
        **options,
    )
    model = get_peft_model(tiny.base(base, layers=1), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def gates(model, name: str = "default") -> list[torch.Tensor]:
    return [layer.sparse_lora_gate[name].detach().clone() for layer in layers_of(model)]


def released(x: torch.Tensor, size: float) -> torch.Tensor:
    """The three assignments of the released optimizer."""
    x = x.clone()
    x[x > size] -= size
    x[x < -size] += size
    x[x.abs() < size] = 0
    return x


def test_thresholds_are_the_equation_and_the_released_lines():
    size = 0.25
    x = torch.tensor([-1.0, -0.5, -0.3, -0.25, -0.1, 0.0, 0.1, 0.25, 0.3, 0.5, 1.0], dtype=torch.float64)
    soft = [max(abs(float(v)) - size, 0) * (1 if v > 0 else -1) for v in x]
    assert soft_threshold(x, size).tolist() == pytest.approx(soft)
    assert torch.equal(dead_zone_threshold(x, size), released(x, size))
    assert dead_zone_threshold(x, size).tolist() != pytest.approx(soft)


def test_a_gate_of_one_without_other_pull_is_gone_after_3333_steps_of_the_released_threshold():
    gate, steps = torch.ones(1, dtype=torch.float64), 0
    while gate.any():
        gate, steps = dead_zone_threshold(gate, 3e-4), steps + 1
    assert steps == 3333


def test_the_start_is_normal_gates_of_both_signs_and_no_update():
    model = adapted(ProximalGate())
    assert model.peft_config["default"].gate == "normal"
    assert {bool(gate > 0) for one in gates(model) for gate in one} == {True, False}
    assert not any(layer.get_delta_weight("default").any() for layer in layers_of(model))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("scaled", [True, False])
def test_after_every_update_gates_are_thresholded_once_with_the_steps_own_rate(scaled, accumulation, tmp_path):
    model = adapted(ProximalGate(weight=3.0 if scaled else 0.05, scaled_by_lr=scaled))
    before, rates, after = {}, {}, {}

    def look(step, model, optimizer):
        before[step], rates[step] = gates(model), optimizer.param_groups[0]["lr"]

    run(
        model, tmp_path, 6, accumulation=accumulation, optimizer="default", weight_decay=0.0, lr=1e-2, warmup_steps=3,
        before=[Hook(on_optimizer_step=look)],
        after=[Hook(on_optimizer_step=lambda step, model, _: after.update({step: gates(model)}))],
    )  # fmt: skip
    assert len(set(rates.values())) > 2
    for step, found in after.items():
        size = 3.0 * rates[step] if scaled else 0.05
        for was, now in zip(before[step], found, strict=True):
            expected = was.double().sign() * (was.double().abs() - size).clamp_min(0)
            torch.testing.assert_close(now.double(), expected, rtol=1e-6, atol=1e-7)
    for layer in layers_of(model):
        assert layer.sparse_lora_rank_mask["default"].tolist() == (layer.sparse_lora_gate["default"] != 0).tolist()


def test_the_mean_of_gates_pulls_by_its_gradient(tmp_path):
    model, seen = adapted(ProximalGate(weight=1e-9), rules=[L1Penalty(3.0, scope="gate")]), {}

    def look(into):
        return Hook(
            on_pre_optimizer_step=lambda step, model, _: seen.update(
                {(into, step): [layer.sparse_lora_gate["default"].grad.clone() for layer in layers_of(model)]}
            )
        )

    run(model, tmp_path, 2, optimizer="default", weight_decay=0.0, before=[look("before")], after=[look("after")])
    number = sum(gate.numel() for gate in gates(model))
    for was, now in zip(seen["before", 1], seen["after", 1], strict=True):
        assert (now - was).abs().tolist() == pytest.approx([3.0 / number] * was.numel(), rel=1e-3)


def test_a_skipped_step_and_masked_labels_leave_gates_alone(tmp_path):
    model = adapted(ProximalGate(weight=0.1, scaled_by_lr=False))
    start = gates(model)
    run(model, tmp_path / "masked", 2, optimizer="default", weight_decay=0.0, data=tiny.TokenData(masked=True))
    assert all(map(torch.equal, start, gates(model)))
    model = adapted(ProximalGate(weight=0.1, scaled_by_lr=False))
    start, flag = gates(model), {}

    def skip(step, model, optimizer):
        optimizer._is_overflow = True  # what AcceleratedOptimizer says after GradScaler skipped
        flag["skipped"] = optimizer.step_was_skipped
        for layer, gate in zip(layers_of(model), start, strict=True):
            layer.sparse_lora_gate["default"].data.copy_(gate)

    run(model, tmp_path / "skipped", 1, optimizer="default", weight_decay=0.0, before=[Hook(on_optimizer_step=skip)])
    assert flag["skipped"]
    assert all(map(torch.equal, start, gates(model)))


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_two_adapters_and_their_export_to_plain_lora(base, tmp_path):
    model = adapted(ProximalGate(weight=0.15, scaled_by_lr=False), base, ("one", "two"))
    model.set_adapter("one")
    other = gates(model, "two")
    run(model, tmp_path / "run", 6, optimizer="default", weight_decay=0.0)
    assert all(map(torch.equal, other, gates(model, "two")))
    ranks = [int((gate != 0).sum()) for gate in gates(model, "one")]
    assert 0 < sum(ranks) < 8
    model.delete_adapter("two")
    deltas = {layer.module_name: layer.get_delta_weight("one") for layer in layers_of(model)}
    hub.export_lora(model, tmp_path / "lora", "one")
    lora = PeftModel.from_pretrained(tiny.base(base, layers=1), tmp_path / "lora")
    for name, module in lora.named_modules():
        if isinstance(module, LoraLayer):
            delta = module.get_delta_weight("default")
            expected = deltas[name.removeprefix("base_model.model.")]
            torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-7)
    model.base_model.compact("one")
    for layer, rank in zip(layers_of(model), ranks, strict=True):
        assert layer.alive_components("one") == rank
        torch.testing.assert_close(layer.get_delta_weight("one"), deltas[layer.module_name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("from_config", [True, False])
def test_weight_decay_leaves_gates_to_the_configs_optimizer_and_is_warned_of_in_another(from_config, tmp_path):
    model = adapted(ProximalGate(weight=1e-12), optimizer=AdamWSpec())
    args = tiny.arguments(tmp_path, 2, weight_decay=0.1)
    options = trainer_options(model, args) if from_config else {"args": args, "callbacks": callbacks_for(model)}
    trainer = Trainer(model=model, train_dataset=tiny.TokenData(), **options)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.train()
    warned = [one for one in found if "weight decay shrinks" in str(one.message)]
    assert bool(warned) != from_config
    groups = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for layer in layers_of(model):
        assert groups[id(layer.sparse_lora_gate["default"])] == (0.0 if from_config else 0.1)
        assert groups[id(layer.sparse_lora_A["default"])] == 0.1


def test_events_are_changes(tmp_path):
    model = adapted(ProximalGate(weight=0.05, scaled_by_lr=False))
    trainer = run(model, tmp_path, 40, optimizer="default", weight_decay=0.0)
    alive = [event["alive"] for event in moves_of(trainer, "proximal_gate")]
    assert len(alive) < 20
    assert all(one != next_one for one, next_one in itertools.pairwise(alive))
    assert alive[-1] == sum(layer.alive_components("default") for layer in layers_of(model))


def test_a_penalty_on_gates_needs_some():
    with pytest.raises(ValueError, match="scope='gate' pulls gates"):
        SparseLoraConfig(r=4, density=0.0, schedule=[L1Penalty(scope="gate")])
