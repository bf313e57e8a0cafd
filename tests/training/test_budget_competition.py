"""SNELLA's bi-level competition in real runs, against hand computations."""

import copy
import warnings

import pytest
import tiny
import torch
from peft import get_peft_model
from training_toolbox import Hook, StopAt, all_state, differences, run, tiny_llama
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from hf_sparse_peft import KernelLoraConfig, Smoothed, callbacks_for
from hf_sparse_peft.rules import Run, Training
from hf_sparse_peft.training import RuleRunner
from hf_sparse_peft.tuners import adapter_layers

STEPS = 20


def make_config(budget=None, **overrides) -> KernelLoraConfig:
    budget = {"sparsity": 0.6, "initial_warmup": 0.2, "final_warmup": 0.25, **(budget or {})}
    options = {
        "r": 4, "kernel": "mixed", "sparsity": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"],
        "task_type": "CAUSAL_LM", "init_weights": False, "schedule": [tiny.kernel_allocation(**budget)],
    }  # fmt: skip
    return KernelLoraConfig(**{**options, **overrides})


def adapted(config: KernelLoraConfig, seed: int = 0, base=None):
    base = tiny_llama(seed) if base is None else base
    torch.manual_seed(seed + 1)
    return get_peft_model(base, copy.deepcopy(config))


def survivors(model) -> list[int]:
    return [int(layer.kernel_lora_survivors["default"]) for layer in adapter_layers(model)]


def rule_of(model):
    (rule,) = model.peft_config["default"].rules
    return rule


def space_of(layer):
    return layer.unit_spaces("default")[0]


def average(layer, kind: str) -> torch.Tensor:
    return torch.cat([layer.rule_state("default")[f"{kind}_{name}"].flatten() for name in "PQ"])


def points(layer) -> tuple:
    return layer.kernel_lora_P, layer.kernel_lora_Q


def sizes(model) -> list[int]:
    return [layer.in_features * layer.out_features for layer in adapter_layers(model)]


def test_survivors_add_up_to_the_cubic_budget_at_every_step_and_reach_both_ends(tmp_path):
    model = adapted(make_config())
    whole = sum(sizes(model))
    start, target = sum(n - round(0.1 * n) for n in sizes(model)), int(0.4 * whole)
    assert survivors(model) == [n - round(0.1 * n) for n in sizes(model)]
    seen = {}
    watch = Hook(on_step_end=lambda update, model, optimizer: seen.update({update: survivors(model)}))
    run(model, tmp_path, STEPS, optimizer="default", after=[watch])
    assert sorted(seen) == list(range(1, STEPS + 1))
    for update, counts in seen.items():
        inside = min(max((update - 4) / (15 - 4), 0.0), 1.0)  # from 0.2 x 20 to 20 - 0.25 x 20
        assert abs(sum(counts) - (target + (start - target) * (1 - inside) ** 3)) <= 0.5, update
        assert all(0 <= count <= size for count, size in zip(counts, sizes(model), strict=True))
    assert sum(seen[4]) == start
    assert sum(seen[15]) == sum(seen[STEPS]) == target < whole
    shares = [count / size for count, size in zip(seen[STEPS], sizes(model), strict=True)]
    assert max(shares) - min(shares) > 0.05  # matrices do differ


def test_the_update_has_as_many_entries_as_survive(tmp_path):
    model = adapted(make_config(mode="code"))
    run(model, tmp_path, STEPS, optimizer="default")
    for layer, count in zip(adapter_layers(model), survivors(model), strict=True):
        assert int((layer.get_delta_weight("default") != 0).sum()) == count


@pytest.mark.parametrize("accumulation", [1, 2])
def test_moving_averages_and_scores_equal_a_hand_computation(accumulation, tmp_path):
    model = adapted(make_config({"score": Smoothed(beta1=0.8, beta2=0.7)}))
    products, seen = {}, {}

    def see(update, model, optimizer):
        products[update] = [
            [(p.detach().double() * p.grad.double()).abs() for p in (held["default"] for held in points(layer))]
            for layer in adapter_layers(model)
        ]

    def look(update, model, optimizer):
        seen[update] = [
            (
                average(layer, "sensitivity"),
                average(layer, "uncertainty"),
                float(rule_of(model).scores(space_of(layer))),
            )
            for layer in adapter_layers(model)
        ]

    run(
        model, tmp_path, 6, accumulation=accumulation, optimizer="default",
        after=[Hook(on_optimizer_step=see, on_step_end=look)],
    )  # fmt: skip
    for number in range(3):
        first, second = products[1][number], products[2][number]
        mean_1 = [0.2 * i for i in first]
        spread_1 = [0.3 * (i - m).abs() for i, m in zip(first, mean_1, strict=True)]
        mean_2 = [0.8 * m + 0.2 * i for m, i in zip(mean_1, second, strict=True)]
        spread_2 = [0.7 * u + 0.3 * (i - m).abs() for u, i, m in zip(spread_1, second, mean_2, strict=True)]
        sensitivity, uncertainty, score = seen[2][number]
        flat = [torch.cat([t.flatten() for t in pair]) for pair in (mean_2, spread_2)]
        torch.testing.assert_close(sensitivity.double(), flat[0], rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(uncertainty.double(), flat[1], rtol=1e-4, atol=1e-12)
        expected = sum((m * u).mean() for m, u in zip(mean_2, spread_2, strict=True))
        assert score == pytest.approx(float(expected), rel=1e-4)
        assert score > 0


def test_a_step_with_numbers_that_are_not_finite_is_left_out_of_the_averages():
    model = adapted(make_config())
    layer, score = adapter_layers(model)[0], rule_of(model).score
    for held in points(layer):
        held["default"].grad = torch.ones_like(held["default"])
    score.update(None, [space_of(layer)])
    before = average(layer, "sensitivity")
    assert (before > 0).all()
    layer.kernel_lora_P["default"].grad[0, 0] = torch.tensor([float("nan"), float("inf")])
    score.update(None, [space_of(layer)])
    assert torch.equal(average(layer, "sensitivity"), before)


def test_sensitivities_under_loss_scaling_are_those_without_it():
    found = []
    for scale in (None, 1024.0):
        model = adapted(make_config())
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        ids = torch.arange(18).view(2, 9)
        scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
        scaler.step(optimizer)  # Trainer calls on_optimizer_step after this
        spaces = [space_of(layer) for layer in adapter_layers(model)]
        training = Training(model, STEPS, optimizer=optimizer)
        rule_of(model).after_update(Run(training, rule_of(model), "default", model.peft_config["default"], spaces))
        found.append([average(layer, "sensitivity") for layer in adapter_layers(model)])
    for plain, scaled in zip(*found, strict=True):
        assert plain.any()
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)


def test_without_additions_and_with_fixed_shares_outputs_are_snells():
    snella = adapted(make_config())
    snell = adapted(make_config(kernel="distance", sparsity=0.6, schedule=[]))
    for layer, other in zip(adapter_layers(snella), adapter_layers(snell), strict=True):
        layer.kernel_lora_mix["default"].data.copy_(torch.tensor([0.0, 1.0, 0.0]))
        for name in ("kernel_lora_P", "kernel_lora_Q"):
            getattr(other, name)["default"].data.copy_(getattr(layer, name)["default"])
        numel = layer.in_features * layer.out_features
        layer.write_survivors("default", numel - round(0.6 * numel))
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        assert torch.equal(snella(input_ids=ids).logits, snell(input_ids=ids).logits)


def finish(model, out, **options):
    last = {}

    def look(update, model, optimizer):
        if update == STEPS:
            last.update(all_state(model, optimizer))

    run(model, out, STEPS, optimizer="default", after=[Hook(on_step_end=look)], batch=2, accumulation=2, **options)
    return last


# Before, while and after the budget falls.
@pytest.mark.parametrize(("kind", "stop"), [("fp32", 3), ("fp32", 9), ("fp32", 17), ("nf4", 9)])
def test_resumed_training_equals_uninterrupted_training_bit_for_bit(kind, stop, tmp_path):
    config = make_config({"every": 2}, mode="code", drop_path=0.2)
    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def model():
        options = {"quantization_config": quantised, "device_map": "cpu"} if kind == "nf4" else {}
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **options)
        return adapted(config, base=base)

    whole = finish(model(), tmp_path / "whole")
    run(model(), tmp_path / "parts", STEPS, optimizer="default", after=[StopAt(stop)], batch=2, accumulation=2)
    fresh = model()
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()  # nothing of the checkpoint may be missing from it
    resumed = finish(fresh, tmp_path / "parts", resume=str(tmp_path / "parts" / f"checkpoint-{stop}"))
    assert any("survivors" in name for name in whole)
    assert any("uncertainty" in name for name in whole)
    assert differences(whole, resumed) == []


def test_a_finished_run_ships_its_survivors_and_nothing_of_the_schedule(tmp_path):
    model = adapted(make_config())
    trainer = run(model, tmp_path, STEPS, optimizer="default")
    trainer.save_model(str(tmp_path / "shipped"))
    names = [name for name in model.state_dict() if "kernel_lora_" in name]
    assert any("survivors" in name for name in names)
    assert not any("sensitivity" in name or "uncertainty" in name for name in names)
    assert model.peft_config["default"].training_finished


def test_callbacks_for_gives_the_callback_where_the_config_asks_for_it():
    for asked, config in ((1, make_config()), (0, make_config(schedule=[]))):
        assert [type(c) for c in callbacks_for(config)] == [RuleRunner] * asked
        assert [type(c) for c in callbacks_for(adapted(config))] == [RuleRunner] * asked


def test_training_without_the_callback_warns_once_and_names_the_mend():
    model = adapted(make_config()).train()
    ids = torch.arange(18).view(2, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
    (message,) = [str(w.message) for w in caught if "asks for" in str(w.message)]
    assert "allocate" in message
    assert "callbacks_for(model)" in message
    assert "in its KernelLoraConfig" in message


def test_a_window_of_one_step_still_reaches_the_target(tmp_path):
    model = adapted(make_config({"initial_warmup": 0.75, "final_warmup": 0.24}))
    run(model, tmp_path, 4, optimizer="default")
    assert sum(survivors(model)) == int(0.4 * sum(sizes(model)))


def test_a_schedule_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every=50 is longer than the run of 4"):
        run(adapted(make_config({"every": 50})), tmp_path, 4, optimizer="default")
