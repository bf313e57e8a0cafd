"""RoSA (Nikdan et al., 2024; official code IST-DASLab/peft-rosa): whose gradients choose the support, and when."""

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn
from training_toolbox import Hook, StopAt, all_state, differences, run

from hf_sparse_peft import ChooseSupport, Controller, SparseLoraConfig, methods
from hf_sparse_peft.tuners import adapter_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(base="fp32", **options):
    torch.manual_seed(2)
    config = methods.get("rosa", r=2, target_modules=TARGETS, density=0.05, task_type="CAUSAL_LM", **options).config
    return get_peft_model(tiny.base(base, layers=1), config)


def layers_of(model):
    return adapter_layers(model)


def units(model):
    return [layer.units("default").clone() for layer in layers_of(model)]


@pytest.mark.parametrize(
    ("score", "reduction", "batches", "chosen"),
    [
        ("mean_squared", "micro_batch", [[0], [1]], (0, 1)),
        ("mean_squared", "example", [[0], [1]], (0, 1)),
        ("mean_squared", "micro_batch", [[0, 1]], (1, 1)),
        ("mean_squared", "step", [[0], [1]], (1, 1)),
        ("mean", "micro_batch", [[0], [1]], (1, 1)),
    ],
)
def test_the_worked_example_for_every_reduction(score, reduction, batches, chosen):
    x, dy = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[3.0, 0.0], [-3.0, 1.0]])
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    base[0].weight.data = torch.tensor([[5.0, 0.0], [0.0, 0.0]])
    rule = ChooseSupport(0, 1, score, reduction)
    config = SparseLoraConfig(r=1, density=0.25, target_modules=["0"], schedule=[rule], lora_alpha=1)
    model = get_peft_model(base, config)
    (layer,) = layers_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    loader = torch.utils.data.DataLoader([0, 1], batch_size=len(batches[0]))
    with Controller(model, optimizer, 2, accumulation=len(batches), dataloader=loader) as rules:
        rules.before_step()
        for number, batch in enumerate(batches):
            ((layer(x[batch]) * dy[batch]).sum() / 2).backward()
            if number < len(batches) - 1:
                rules.after_micro_batch()
        optimizer.step()
        rules.after_step()
        row, column = chosen
        assert layer.units("default").tolist() == [2 * row + column]


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_the_support_is_chosen_at_the_current_weight_and_trains_from_the_step_after(base, tmp_path):
    model, seen, squares = adapted(base, warmup=3, steps=2), [], {}
    drawn = units(model)

    def dense_gradients(step, model, optimizer):
        # By brute force: a dense delta of every weight, at W + s B A, for the batch of the coming step.
        if step in (4, 5):  # counted from 1
            for layer in layers_of(model):
                layer.add_gradient_reader(
                    "default", lambda g, name=layer.module_name: squares.setdefault(name, []).append(g.float() ** 2)
                )

    def after(step, model, optimizer):
        values = [layer.sparse_lora_values["default"] for layer in layers_of(model)]
        seen.append((units(model), [v.grad is not None for v in values], [bool(v.any()) for v in values]))

    def before_update(step, model, optimizer):
        seen.append([layer.sparse_lora_values["default"].grad is not None for layer in layers_of(model)])

    hooks = {
        "before": [Hook(on_step_begin=dense_gradients)],
        "after": [Hook(on_pre_optimizer_step=before_update, on_step_end=after)],
    }
    run(model, tmp_path, 8, optimizer="default", **hooks)
    trained, ends = seen[0::2], seen[1::2]
    assert [any(one) for one in trained] == [False] * 5 + [True] * 3
    for step, (found, _, moved) in enumerate(ends, 1):
        assert any(moved) == (step > 5)
        same = all(torch.equal(a, b) for a, b in zip(found, drawn, strict=True))
        assert same == (step < 5)
    for layer, found in zip(layers_of(model), ends[4][0], strict=True):
        F = sum(squares[layer.module_name][:2]).flatten()
        assert set(F.topk(found.numel()).indices.tolist()) == set(found.tolist())


def test_factors_move_during_the_warm_up_and_with_a_restart_they_are_what_they_were(tmp_path):
    for restart in (False, True):
        model, seen = adapted(warmup=2, restart=restart), []
        start = [p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]

        def after(step, model, optimizer, seen=seen):
            state = getattr(optimizer, "optimizer", optimizer).state
            factors = {p: n for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
            seen.append(([p.detach().clone() for p in factors], [bool(state.get(p)) for p in factors]))

        run(model, tmp_path, 6, optimizer="default", after=[Hook(on_step_end=after)])
        assert not any(torch.equal(a, b) for a, b in zip(seen[1][0], start, strict=True))
        same = [torch.equal(a, b) for a, b in zip(seen[2][0], start, strict=True)]
        assert all(same) == restart
        assert any(seen[2][1]) != restart
        assert not any(torch.equal(a, b) for a, b in zip(seen[3][0], start, strict=True))


@pytest.mark.parametrize("middle", [1, 3, 4, 5])
@pytest.mark.parametrize("restart", [False, True])
def test_a_run_that_stops_goes_on_to_the_bit(middle, restart, tmp_path):
    def end(folder, stop=None, resume=None):
        model, found = adapted(warmup=2, steps=2, restart=restart), {}
        hook = Hook(on_step_end=lambda step, model, optimizer: found.update(now=all_state(model, optimizer)))
        callbacks = [hook, *([StopAt(stop)] if stop else [])]
        run(model, tmp_path / folder, 8, optimizer="default", after=callbacks, resume=resume)
        return found["now"]

    whole = end("whole")
    end("stopped", stop=middle)
    assert not differences(whole, end("again", resume=str(tmp_path / "stopped" / f"checkpoint-{middle}")))


def test_entries_are_neither_scaled_nor_dropped_out():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10))
    outputs, halves = [], []
    for alpha in (4, 8):
        config = methods.get("rosa", r=2, lora_alpha=alpha, density=0.2, target_modules=["0"], lora_dropout=0.9).config
        model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), config)
        model.base_model.model[0].base_layer.load_state_dict(base[0].state_dict())
        (layer,) = layers_of(model)
        torch.manual_seed(1)
        layer.sparse_lora_values["default"].data.normal_()
        x = torch.randn(4, 12)
        layer.train()
        y = layer(x)  # B is 0: what is left is the support's
        torch.testing.assert_close(y, base(x) + x @ layer.get_delta_weight("default").t(), rtol=1e-5, atol=1e-5)
        outputs.append(y.detach())
        layer.sparse_lora_B["default"].data.normal_()
        layer.sparse_lora_A["default"].data.fill_(0.1)
        layer.sparse_lora_values["default"].data.zero_()
        halves.append(layer.get_delta_weight("default") / alpha)
    torch.testing.assert_close(*outputs)
    assert halves[0].any()
    torch.testing.assert_close(*halves)  # the low-rank half is


def test_a_head_trains_and_a_support_alone_waits_without_moving(tmp_path):
    model, seen = adapted(warmup=2, modules_to_save=["lm_head"]), []
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n and p.requires_grad]
    before = head[0].detach().clone()
    run(model, tmp_path, 4, optimizer="default")
    assert not torch.equal(head[0], before)
    torch.manual_seed(2)
    config = SparseLoraConfig(r=0, density=0.05, target_modules=TARGETS, schedule=[ChooseSupport(2)])
    model = get_peft_model(tiny.base(layers=1), config)

    def after(step, model, optimizer):
        seen.append(any(bool(layer.sparse_lora_values["default"].any()) for layer in layers_of(model)))

    run(model, tmp_path, 5, optimizer="default", after=[Hook(on_step_end=after)])
    assert seen == [False] * 3 + [True] * 2


def test_layers_without_gradients_keep_their_units_and_are_named(tmp_path):
    model = adapted(warmup=1)
    drawn = units(model)
    with pytest.warns(UserWarning, match=r"the support was not chosen in any of the 3 layers"):
        run(model, tmp_path, 4, optimizer="default", data=tiny.TokenData(masked=True))
    assert all(torch.equal(a, b) for a, b in zip(units(model), drawn, strict=True))


def test_what_cannot_work_is_refused_by_name(tmp_path):
    for options, message in (
        ({"warmup": 4}, r"choose the support after step 5, and the run has 5"),
        ({"warmup": 1, "reduction": "example"}, r"reduction='example' .* micro-batches have 4 examples"),
    ):
        with pytest.raises(ValueError, match=message):
            run(adapted(**options), tmp_path, 5, optimizer="default")
    with pytest.raises(ValueError, match=r"ChooseSupport fills a support.*criterion='fisher'"):
        methods.get("rosa", criterion="fisher")
