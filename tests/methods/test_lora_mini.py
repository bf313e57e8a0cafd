"""LoRA-Mini (Singh et al., 2024): four factors of which the inner two are trained (abstract). Sizes, start and scaling
are this project's choices and are not claimed to be the authors'."""

import torch
from peft import PeftModel
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, on, random, trained, weight_gradient

from hf_sparse_peft import hub, methods
from hf_sparse_peft.tuners.spectral_lora import SpectralLoraLayer

W = random(12, 10)
OPTIONS = {"r": 2, "lora_alpha": 6, "inner": 5}


def outer(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """B_out and A_out, float64."""
    held = layer._tensors("default")
    return held["spectral_lora_basis_B"].double(), held["spectral_lora_basis_A"].double()


def inner(layer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """B_in and A_in."""
    return layer.spectral_lora_core_B["default"], layer.spectral_lora_core_A["default"]


def test_it_starts_at_the_base_and_its_first_gradient_is_the_inner_b_s():
    _, (layer,) = on("lora-mini", W, **OPTIONS)
    (B_out, A_out), (B_in, A_in) = outer(layer), inner(layer)
    x, G = random(4, 10, seed=1), random(12, 10, seed=2)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert A_in.abs().max() <= 5**-0.5
    weight_gradient(layer, G)
    assert not A_in.grad.any()
    close(B_in.grad, 3 * B_out.t() @ G.double() @ (A_in.detach().double() @ A_out).t())


def test_the_update_lies_in_the_outer_projections(tmp_path):
    model, (layer,) = on("lora-mini", W, **OPTIONS)
    (B_out, A_out), (B_in, A_in) = outer(layer), inner(layer)
    B_in.data.copy_(random(5, 2, seed=3))
    delta = layer.get_delta_weight("default").double()
    close(delta, 3 * B_out @ B_in.detach().double() @ A_in.detach().double() @ A_out)
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 2
    assert torch.linalg.matrix_rank(torch.cat([B_out, delta], 1), rtol=1e-5) == 5
    assert torch.linalg.matrix_rank(torch.cat([A_out, delta]), rtol=1e-5) == 5
    assert hub.export_lora(model, tmp_path).ranks == {"lin.0": 2}
    x = random(4, 10, seed=1)
    close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x))


def test_outer_projections_are_of_kaimings_range_in_no_file_and_not_trained(tmp_path):
    model, layers = on("lora-mini", W, random(10, 12, seed=1), **OPTIONS)
    before = [outer(layer) for layer in layers]
    for (B, A), layer in zip(before, layers, strict=True):
        assert 0.8 * layer.in_features**-0.5 < A.abs().max() <= layer.in_features**-0.5
        assert 0.8 * 5**-0.5 < B.abs().max() <= 5**-0.5
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1)
    model(random(4, 10, seed=1)).sum().backward()
    optimizer.step()
    assert {name.split(".")[2] for name in trained(model)} == {"spectral_lora_core_A", "spectral_lora_core_B"}
    for (B, A), layer in zip(before, layers, strict=True):
        assert torch.equal(outer(layer)[0], B)
        assert torch.equal(outer(layer)[1], A)
    model.save_pretrained(tmp_path)
    kinds = {key.rpartition("lora_")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert kinds == {"core_A", "core_B", "shape"}
    x = random(4, 10, seed=1)
    assert torch.equal(PeftModel.from_pretrained(Linears(W, random(10, 12, seed=1)), tmp_path)(x), model(x))


def test_numbers_of_a_module_of_4096():
    specs = SpectralLoraLayer.tensor_specs(methods.get("lora-mini").config, "lin", 4096, 4096)
    assert sum(spec.shape[0] * spec.shape[1] for spec in specs if spec.role == "trained") == 2048
