"""S2-LoRA (Liu et al., 2024): shared factors and sparse coefficients, from the paper's equations, in float64. Start,
penalty and rates are this project's choices and are not claimed to be the authors'."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spectral_toolbox import close, random
from test_sharelora import Blocks

from hf_sparse_peft import ProximalGate, callbacks_for, hub, methods
from hf_sparse_peft.sparsity import soft_threshold
from hf_sparse_peft.tuners.spectral_lora import spectral_layers


def shared(count: int = 3, side: int = 6, r: int = 4, **options):
    torch.manual_seed(0)
    model = get_peft_model(Blocks(count, side), methods.get("s2-lora", r=r, target_modules=["q"], **options).config)
    return model, spectral_layers(model)


def fill(layers) -> list[torch.Tensor]:
    """Coefficients of some training, float64: the second layer's are all 0."""
    e = [random(4, seed=at) * torch.tensor([1.0, 0.0, 1.0, 1.0]) * (at != 1) for at in range(len(layers))]
    for layer, values in zip(layers, e, strict=True):
        layer.spectral_lora_core["default"].data.copy_(values)
    return [values.double() for values in e]


def factors(layers) -> tuple[torch.Tensor, torch.Tensor]:
    return layers[0].spectral_lora_B["default"], layers[0].spectral_lora_A["default"]


def test_numbers_are_one_pair_of_factors_and_r_a_module_and_files_have_them_once(tmp_path):
    model, layers = shared(12, 64, 32)
    assert model.get_nb_trainable_parameters()[0] == 2 * 32 * 64 + 12 * 32
    B, A = factors(layers)
    assert all(layer._tensors("default")["spectral_lora_A"] is A for layer in layers)
    assert 0.018 < A.std() < 0.022
    assert 0.018 < B.std() < 0.022
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    floats = sum(tensor.numel() for tensor in held.values() if tensor.is_floating_point())
    assert floats == 2 * 32 * 64 + 12 * 32
    loaded = spectral_layers(PeftModel.from_pretrained(Blocks(12, 64), tmp_path))
    assert all(layer._tensors("default")["spectral_lora_A"] is factors(loaded)[1] for layer in loaded)


def test_the_update_is_b_diag_e_a_and_a_module_without_coefficients_is_the_base():
    _, layers = shared()
    e, (B, A) = fill(layers), factors(layers)
    for layer, values in zip(layers, e, strict=True):
        close(layer.get_delta_weight("default"), B.detach().double() @ torch.diag(values) @ A.detach().double())
    assert not layers[1].get_delta_weight("default").any()


def test_the_first_step_moves_coefficients_only_and_shared_factors_get_the_sum_over_modules():
    model, layers = shared()
    x, (B, A) = random(5, 6, seed=7), factors(layers)
    assert torch.equal(model(x), Blocks(3)(x))
    model(x).square().sum().backward()
    assert not A.grad.any()
    assert not B.grad.any()
    assert all(layer.spectral_lora_core["default"].grad.all() for layer in layers)
    model.zero_grad()
    fill(layers)
    model(x).square().sum().backward()
    leaves = [
        p.detach().double().requires_grad_() for p in (B, A, *(one.spectral_lora_core["default"] for one in layers))
    ]
    y = x.double()
    for layer, e in zip(layers, leaves[2:], strict=True):
        y = y + y @ (layer.base_layer.weight.double() + leaves[0] @ torch.diag(e) @ leaves[1]).t()
    y.square().sum().backward()
    found = [B, A, *(layer.spectral_lora_core["default"] for layer in layers)]
    for parameter, leaf in zip(found, leaves, strict=True):
        close(parameter.grad, leaf.grad)


def test_the_threshold_of_the_worked_example():
    close(soft_threshold(torch.tensor([0.5, -0.2, 0.05]), 0.1), torch.tensor([0.4, -0.1, 0.0]))


def test_the_threshold_acts_once_an_optimizer_step_by_the_coefficients_rate(tmp_path):
    model = get_peft_model(tiny.base(), methods.get("s2-lora", r=6, weight=0.5, target_modules=["q_proj"]).config)
    seen = []

    def look(step, model, optimizer):
        seen.append([layer.spectral_lora_core["default"].detach().clone() for layer in spectral_layers(model)])

    # The runner is between the two: what the optimizer made of the coefficients, and what the threshold left.
    callbacks = [tiny.At(on_optimizer_step=look), *callbacks_for(model), tiny.At(on_optimizer_step=look)]
    tiny.train(model, tmp_path, 3, callbacks=callbacks, gradient_accumulation_steps=2, lr_scheduler_type="constant")
    assert len(seen) == 6
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        for left, right in zip(before, after, strict=True):
            close(right, left.sign() * (left.abs() - 0.5 * 1e-2).clamp_min(0))
    layer = spectral_layers(model)[0]
    assert layer.spectral_lora_core_mask["default"].tolist() == (seen[-1][0] != 0).int().tolist()


def test_modules_with_other_teachers_keep_other_components():
    teachers = [random(6, 1, seed=20 + at) @ random(1, 6, seed=30 + at) for at in range(2)]
    _, layers = shared(2, r=2)
    parameters = [*factors(layers), *(layer.spectral_lora_core["default"] for layer in layers)]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(1500):
        optimizer.zero_grad()
        B, A = parameters[:2]
        sum((B * e @ A - t).square().sum() for e, t in zip(parameters[2:], teachers, strict=True)).backward()
        optimizer.step()
        for e in parameters[2:]:
            e.data.copy_(soft_threshold(e.data, 0.02 * 0.3))
    patterns = [(e != 0).tolist() for e in parameters[2:]]
    assert sorted(patterns) == [[False, True], [True, False]]


def test_the_lora_has_the_living_components_of_each_module_and_leaves_out_one_with_none(tmp_path):
    model, layers = shared()
    fill(layers)
    assert hub.export_lora(model, tmp_path).ranks == {"block.0.q": 3, "block.2.q": 3}
    x = random(5, 6, seed=7)
    close(PeftModel.from_pretrained(Blocks(3), tmp_path)(x), model(x))


def test_a_full_core_has_no_component_that_could_die():
    with pytest.raises(ValueError, match=r"ProximalGate lets single components die; set core=Diagonal\(\)"):
        methods.get("lora-xs", schedule=[ProximalGate()])
