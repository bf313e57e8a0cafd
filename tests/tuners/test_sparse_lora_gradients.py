"""Gradients of an adapted layer against float64 autograd on dense matrices, and the ways a model may ask for them."""

import pytest
import tiny
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from tuner_toolbox import (
    CASES,
    dense_delta,
    dense_sparse_half,
    fill,
    logits,
    make_config,
    tiny_llama,
    token_ids,
    trained,
)

from hf_sparse_peft import Allocate, AverageRank
from hf_sparse_peft.tuners import adapter_layers


def dense_base(layer):
    weight = layer.get_base_weight().detach().double()
    return weight.t() if layer.fan_in_fan_out else weight


def reference(layer, x, grad_output, adapter="default"):
    """Output and gradients of one layer by float64 autograd, written from the equation."""
    x = x.detach().double().requires_grad_()
    weight, leaves = dense_base(layer), {}
    for name in layer.adapter_layer_names:
        if adapter in getattr(layer, name):
            leaves[name] = getattr(layer, name)[adapter].detach().double().requires_grad_()
    if "sparse_lora_values" in leaves:
        weight = weight + dense_sparse_half(layer, adapter, leaves["sparse_lora_values"])
    y = x @ weight.t()
    if "sparse_lora_A" in leaves:
        hidden = x @ leaves["sparse_lora_A"].t()
        if "sparse_lora_gate" in leaves:
            hidden = hidden * leaves["sparse_lora_gate"]
        y = y + layer.sparse_lora_scaling[adapter] * hidden @ leaves["sparse_lora_B"].t()
    if layer.get_base_layer().bias is not None:
        y = y + layer.get_base_layer().bias.double()
    y.backward(grad_output.double())
    return y.detach(), x.grad, {name: leaf.grad for name, leaf in leaves.items()}


TOLERANCE = {"fp32": 1e-5, "conv1d": 1e-5, "nf4": 1e-5, "bf16": 2e-2, "int8": 2e-2}


def close(actual, expected, base):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[base], f"relative error {error:.1e}"


@pytest.mark.parametrize("case", [*CASES, "gate-entry"])
@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4", "int8", "conv1d"])
def test_gradients_of_every_adapter_tensor_equal_the_dense_reference(base_of, base, case):
    options = {"schedule": [Allocate(budget=AverageRank(2))]} if case.startswith("gate") else {}
    model = get_peft_model(base_of(base), make_config(case.replace("gate", "hybrid"), base, **options)).train()
    fill(model)
    torch.manual_seed(3)
    for layer in adapter_layers(model)[:3]:
        dtype = torch.bfloat16 if base == "bf16" else torch.float32
        x = torch.randn(2, 5, layer.in_features).to(dtype).requires_grad_()
        grad_output = torch.randn(2, 5, layer.out_features).to(dtype)
        y = layer(x)
        y.backward(grad_output)
        expected_y, expected_x, expected = reference(layer, x, grad_output)
        assert y.dtype == x.grad.dtype == dtype
        close(y, expected_y, base)
        close(x.grad, expected_x, base)
        assert expected.keys() == {n for n in layer.adapter_layer_names if "default" in getattr(layer, n)}
        for name, gradient in expected.items():
            parameter = getattr(layer, name)["default"]
            assert parameter.grad.dtype == parameter.dtype == torch.float32
            close(parameter.grad, gradient, base)


@pytest.mark.parametrize("case", CASES)
def test_bf16_autocast_over_an_fp32_base_gives_fp32_gradients(base_of, case):
    model = get_peft_model(base_of(), make_config(case)).train()
    fill(model)
    layer = adapter_layers(model)[0]
    x, grad_output = torch.randn(4, layer.in_features), torch.randn(4, layer.out_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(grad_output.bfloat16())
    _, _, expected = reference(layer, x, grad_output)
    for name, gradient in expected.items():
        parameter = getattr(layer, name)["default"]
        assert parameter.grad.dtype == torch.float32
        close(parameter.grad, gradient, "bf16")


@pytest.mark.parametrize("case", ["sparse-entry", "hybrid-block"])
def test_two_active_adapters_get_the_gradients_of_their_sum(base_of, case):
    model = get_peft_model(base_of(), make_config(case))
    model.add_adapter("other", make_config("hybrid-row", seed=5))
    fill(model)
    fill(model, "other", seed=8)
    model.base_model.set_adapter(["default", "other"])
    layer = adapter_layers(model)[0]
    x, grad_output = torch.randn(4, layer.in_features), torch.randn(4, layer.out_features)
    layer(x).backward(grad_output)
    for adapter, other in (("default", "other"), ("other", "default")):
        # The gradient of one adapter's tensors does not depend on the other's: dW is a sum.
        _, _, expected = reference(layer, x, grad_output, adapter)
        for name, gradient in expected.items():
            close(getattr(layer, name)[adapter].grad, gradient, "fp32")
        assert dense_delta(layer, other).abs().max() > 0


def gradients(model, **kwargs):
    model.zero_grad()
    model(input_ids=token_ids(), labels=token_ids(), **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in trained(model).items()}


@tiny.crossed(case=CASES, base=["fp32", "nf4"], reentrant=[True, False])
def test_gradient_checkpointing_changes_no_gradient(base_of, case, base, reentrant):
    model = get_peft_model(base_of(base), make_config(case)).train()
    fill(model)
    plain = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_accumulate_to_the_gradient_of_the_batch(case):
    model = get_peft_model(tiny_llama(), make_config(case)).train()
    fill(model)
    ids = token_ids(batch=4)
    model(input_ids=ids, labels=ids).loss.backward()
    whole = {name: p.grad.clone() for name, p in trained(model).items()}
    model.zero_grad()
    for part in ids.split(1):
        (model(input_ids=part, labels=part).loss / 4).backward()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_qlora_recipe_trains_on_nf4(base_of, case):
    model = prepare_model_for_kbit_training(
        base_of("nf4"), gradient_checkpointing_kwargs={"use_reentrant": case.startswith("sparse")}
    )
    model = get_peft_model(model, make_config(case, target_modules="all-linear")).train()
    packed = {n: t.clone() for n, t in model.state_dict().items() if "sparse_lora_" not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)
    ids, losses = token_ids(batch=4), []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, losses
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in packed.items())


@pytest.mark.parametrize("case", ["sparse-entry", "low_rank-entry"])
def test_an_evaluation_in_between_does_not_change_nf4_gradients(base_of, case):
    # bitsandbytes repacks 4-bit CPU weights at the first evaluation; its kernel for them has no gradient, so one such
    # layer, adapted or not, would cut off every adapter before it.
    model = get_peft_model(base_of("nf4"), make_config(case, target_modules=["q_proj"])).train()
    fill(model)
    before = gradients(model)
    logits(model)
    model.train()
    after = gradients(model)
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
