"""PaCA (Woo et al., 2025; official code WooSunghyeon/paca) against its equations, in float64."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from spectral_toolbox import Linears, random

from hf_sparse_peft import hub, methods
from hf_sparse_peft.tuners import adapter_layers

W = random(10, 14)


def adapted(alpha: float = 4.0, bias: bool = False):
    model = get_peft_model(Linears(W), methods.get("paca", r=4, lora_alpha=alpha, target_modules=["lin.0"]).config)
    (layer,) = adapter_layers(model)
    if bias:
        layer.get_base_layer().bias = torch.nn.Parameter(random(10, seed=9), requires_grad=False)
    return model, layer


def columns(layer):
    return layer.units("default").long()


def test_a_fresh_adapter_is_the_base_bit_for_bit():
    model, layer = adapted(bias=True)
    x = random(5, 14, seed=1)
    assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert model.get_nb_trainable_parameters()[0] == 4 * 10


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_five_steps_of_adam_are_the_official_forms_that_writes_back_at_every_step(alpha):
    _, layer = adapted(alpha)
    layer.to(torch.float64)
    s, C = alpha / 4, columns(layer)
    P = torch.nn.Parameter(W.double()[:, C] / s)
    values = layer.sparse_lora_values["default"]
    values.data = values.data.double()
    ours, theirs = torch.optim.Adam([values], lr=1e-2), torch.optim.Adam([P], lr=1e-2)
    for step in range(5):
        x, target = random(6, 14, seed=step).double(), random(6, 10, seed=50 + step).double()
        weight = W.double().index_copy(1, C, s * P)
        for optimizer, y in ((theirs, x @ weight.t()), (ours, layer(x))):
            optimizer.zero_grad()
            (y - target).square().mean().backward()
            optimizer.step()
        delta = (s * P.detach() - W.double()[:, C]).t()
        torch.testing.assert_close(s * values.detach(), delta, rtol=0, atol=1e-12)


def test_every_forward_pass_sees_the_last_update_and_disabling_shows_the_base():
    model, layer = adapted(16.0)
    optimizer = torch.optim.Adam([layer.sparse_lora_values["default"]], lr=1e-1)
    x = random(6, 14, seed=2)
    for _ in range(4):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        merged = W + layer.get_delta_weight("default")
        torch.testing.assert_close(layer(x), x @ merged.t(), rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(layer(x), layer.get_base_layer()(x))


def test_it_leaves_as_a_lora_of_rank_r(tmp_path):
    model, layer = adapted()
    layer.sparse_lora_values["default"].data.normal_()
    x = random(6, 14, seed=3)
    assert set(hub.export_lora(model, tmp_path).ranks.values()) == {4}
    torch.testing.assert_close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)


def test_columns_not_rows_train():
    _, layer = adapted()
    x, dy = random(6, 14, seed=4), random(6, 10, seed=5)
    other = next(j for j in range(14) if j not in columns(layer).tolist())
    gradients = []
    for change in (0.0, 3.0):
        moved = x.clone()
        moved[:, other] += change
        layer.sparse_lora_values["default"].grad = None
        layer(moved).backward(dy)
        gradients.append(layer.sparse_lora_values["default"].grad.clone())
    assert torch.equal(*gradients)
    torch.testing.assert_close(gradients[0], (dy.t() @ x)[:, columns(layer)].t())


def test_columns_follow_from_the_seed_and_the_name_whatever_the_global_generator():
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(columns(adapted()[1]).tolist())
    assert found[0] == found[1]
    weights = [W, W, W]
    model = get_peft_model(Linears(*[random(14, 14)] * 3), methods.get("paca", r=4, target_modules="all-linear").config)
    assert len({tuple(columns(layer).tolist()) for layer in adapter_layers(model)}) == len(weights)
