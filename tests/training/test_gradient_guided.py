"""ALLoRA's gradients and LoRA-GGPO's noise, against their equations in float64 and worked numbers."""

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn
from training_toolbox import Hook, layers_of, run

from hf_sparse_peft import AdaptiveRowScale, Controller, GradientNoise, SparseLoraConfig, methods


def single(rule, weight, A, B, alpha: float, **options):
    """One linear layer with these numbers, its optimizer, and the rule at work."""
    base = nn.Sequential(nn.Linear(len(weight[0]), len(weight), bias=False))
    base[0].weight.data = torch.tensor(weight)
    config = SparseLoraConfig(r=len(A), lora_alpha=alpha, density=0.0, target_modules=["0"], schedule=[rule], **options)
    model = get_peft_model(base, config).train()
    (layer,) = layers_of(model)
    layer.sparse_lora_A["default"].data = torch.tensor(A)
    layer.sparse_lora_B["default"].data = torch.tensor(B)
    return model, layer, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


ALLORA = ([[0.0] * 3] * 2, [[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], [[0.0, 0.0], [0.3, 0.4]], 2.0)


def test_gradients_are_those_of_the_worked_example_and_the_inputs_is_the_plain_one():
    model, layer, optimizer = single(AdaptiveRowScale(2.0**0.5), *ALLORA)
    x = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    plain = x @ (torch.tensor(ALLORA[2]) @ torch.tensor(ALLORA[1])).t()
    (expected_x,) = torch.autograd.grad((plain * torch.tensor([[1.0, -2.0]])).sum(), x)
    torch.testing.assert_close(model(x), plain)
    outside = model(x).detach()
    with Controller(model, optimizer, total_steps=2) as rules:
        rules.before_step()
        y = model(x)
        assert torch.equal(y, outside)
        (y * torch.tensor([[1.0, -2.0]])).sum().backward()
        torch.testing.assert_close(x.grad, expected_x)
        B, A = layer.sparse_lora_B["default"].grad, layer.sparse_lora_A["default"].grad
        assert B.flatten().tolist() == pytest.approx([9.89949494, -1.41421356, -13.73793127, 1.96256161], rel=1e-5)
        expected = [-0.58876848, -1.17753697, -1.76630545, -0.78502464, -1.57004929, -2.35507393]
        assert A.flatten().tolist() == pytest.approx(expected, rel=1e-5)
        optimizer.step()
        rules.after_step()
        optimizer.zero_grad()
    assert not layer._forward_hooks


def test_a_row_of_the_product_not_of_b_is_scaled_so_that_a_is_too():
    model, layer, optimizer = single(AdaptiveRowScale(1.0), [[0.0] * 2] * 2, [[1.0, 0.0]], [[1.0], [2.0]], 1.0)
    with Controller(model, optimizer, total_steps=2) as rules:
        rules.before_step()
        model(torch.tensor([[1.0, 0.0]])).sum().backward()  # G_W = [[1, 0], [1, 0]]
        assert layer.sparse_lora_A["default"].grad.tolist()[0] == pytest.approx([1.8618, 0.0], abs=5e-5)
        assert layer.sparse_lora_B["default"].grad.flatten().tolist() == pytest.approx([0.7071, 0.5774], abs=5e-5)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
@pytest.mark.parametrize("density", [0.0, 0.1])
def test_in_a_run_gradients_are_row_scaled_ones_of_the_dense_gradient(base, density, tmp_path):
    torch.manual_seed(0)
    config = SparseLoraConfig(
        r=3, density=density, target_modules=["q_proj", "down_proj"], schedule=[AdaptiveRowScale(2.0)],
        init_weights=False,
    )  # fmt: skip
    model, dense = get_peft_model(tiny.base(base, layers=1), config), {}

    def watch(layer, args, output):
        x = args[0].detach().double().flatten(0, -2)

        def backward(gradient):
            dense[layer] = dense.get(layer, 0) + gradient.detach().double().flatten(0, -2).t() @ x

        output.register_hook(backward)

    for layer in layers_of(model):
        layer.register_forward_hook(watch)

    def look(step, model, optimizer):
        for layer in layers_of(model):
            A, B = (getattr(layer, f"sparse_lora_{name}")["default"] for name in "AB")
            scale, G = layer.sparse_lora_scaling["default"], dense.pop(layer)
            rows = (scale * B.double() @ A.double()).norm(dim=1)
            scaled = scale * G / (rows + 0.25).sqrt()[:, None]
            torch.testing.assert_close(B.grad.double(), scaled @ A.double().t(), rtol=1e-3, atol=1e-7)
            torch.testing.assert_close(A.grad.double(), B.double().t() @ scaled, rtol=1e-3, atol=1e-7)

    run(model, tmp_path, 3, optimizer="default", accumulation=2, after=[Hook(on_pre_optimizer_step=look)],
        max_grad_norm=0.0)  # fmt: skip


GGPO = ([[3.0, 4.0], [0.0, 1.0]], [[1.0, -1.0]], [[0.5], [0.0]], 2.0)


def test_noise_has_the_deviations_of_the_worked_example():
    model, layer, optimizer = single(GradientNoise(), *GGPO)
    with Controller(model, optimizer, total_steps=400) as rules:
        x, drawn = torch.eye(2), []
        for step in range(400):
            rules.before_step()
            y = model(x)
            noise = y.detach().t() - torch.tensor(GGPO[0]) - 2 * torch.tensor(GGPO[2]) @ torch.tensor(GGPO[1])
            assert bool(noise.abs().max() > 1e-4) == (step > 0)  # none before there is a gradient
            drawn += [noise] if step else []
            layer.sparse_lora_A["default"].grad = torch.tensor([[0.2, 0.1]])
            layer.sparse_lora_B["default"].grad = torch.tensor([[0.3], [-0.1]])
            optimizer.step()
            if step == 1:
                assert layer.rule_state("default")["row_gradient"].tolist() == pytest.approx([0.94339811, 0.28284271])
                (run_,) = rules._steps.rules.runs
                (space,) = run_.all_spaces
                assert run_.rule.deviations(run_, space).tolist() == pytest.approx([0.07664949, 0.0642053], rel=1e-5)
            rules.after_step()
        found = torch.stack(drawn).square().mean((0, 2)).sqrt()
        assert found.tolist() == pytest.approx([0.07664949, 0.0642053], rel=0.08)
        model.eval()
        evaluated = model(x).detach()
    torch.testing.assert_close(evaluated.t(), torch.tensor(GGPO[0]) + torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_gradients_are_those_at_the_perturbed_weights_also_with_checkpointing(base, tmp_path):
    def trained(rule, folder, **options):
        torch.manual_seed(0)
        config = SparseLoraConfig(
            r=2, density=0.0, target_modules=["q_proj", "down_proj"], schedule=[rule] * bool(rule)
        )
        model = get_peft_model(tiny.base(base, layers=1), config)
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
        run(model, tmp_path / folder, 4, optimizer="default", **options)
        assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in before.items())
        assert not any(layer._forward_hooks for layer in layers_of(model))
        return [layer.get_delta_weight("default") for layer in layers_of(model)]

    plain, noisy = trained(None, "plain"), trained(GradientNoise(0.3), "noisy")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    again, none = trained(GradientNoise(0.3), "again", **options), trained(GradientNoise(0.0, 0.0), "none")
    assert not any(torch.allclose(one, two, atol=1e-5) for one, two in zip(plain, noisy, strict=True))
    for one, two in zip((*noisy, *plain), (*again, *none), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_rows_and_what_cannot_work():
    assert methods.get("allora", r=4).config.lora_alpha == 4
    assert methods.get("lora-ggpo").config.schedule == [GradientNoise(0.03, 0.01)]
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1 hides"):
        SparseLoraConfig(lora_dropout=0.1, schedule=[AdaptiveRowScale()])
