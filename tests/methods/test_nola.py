"""NOLA (Koohpayegani et al., 2024; official code UCDvision/NOLA) against its equations, in float64."""

import torch
from peft import PeftModel
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, on, random, tensors, trained, weight_gradient

from hf_sparse_peft import hub
from hf_sparse_peft.ops.seeded import seeded_uniform

W = random(12, 10)
OPTIONS = {"r": 3, "lora_alpha": 6, "k": 5}


def bases(layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A_0 `[r, in]`, the A_i `[k, r, in]` and the B_j `[k, out, r]`, drawn one after the other, float64."""
    site, k = layer.site("default"), layer.adapter_configs["default"].bases.k
    A0 = seeded_uniform(site.stream("A0"), site.r, site.cols).double() / site.cols**0.5
    A = [seeded_uniform(site.stream("A"), site.r, site.cols, start=i * site.r * site.cols) for i in range(k)]
    B = [seeded_uniform(site.stream("B"), site.rows, site.r, start=j * site.rows * site.r) for j in range(k)]
    return A0, torch.stack(A).double() / k**0.5, torch.stack(B).double() / k**0.5


def filled(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients of some training."""
    for seed, held in enumerate((layer.spectral_lora_A_coefficients, layer.spectral_lora_B_coefficients)):
        held["default"].data.copy_(random(held["default"].numel(), seed=seed))
    held = tensors(layer)
    return held["A_coefficients"], held["B_coefficients"]


def test_the_update_is_the_product_of_two_sums_of_random_matrices():
    _, (layer,) = on("nola", W, **OPTIONS)
    (alpha, beta), (A0, A, B) = filled(layer), bases(layer)
    expected = 6 / 3 * torch.einsum("k,kij->ij", beta, B) @ (A0 + torch.einsum("k,kij->ij", alpha, A))
    close(layer.get_delta_weight("default"), expected)
    x = random(4, 10, seed=3)
    close(layer(x), x.double() @ (W.double() + expected).t())


def test_gradients_are_inner_products_with_the_matrices_and_only_beta_has_one_at_the_first_step():
    _, (layer,) = on("nola", W, **OPTIONS)
    G, (A0, A, B) = random(12, 10, seed=4), bases(layer)
    weight_gradient(layer, G)
    alpha, beta = layer.spectral_lora_A_coefficients["default"], layer.spectral_lora_B_coefficients["default"]
    assert not alpha.grad.any()
    close(beta.grad, 2 * torch.einsum("ij,kij->k", G.double() @ A0.t(), B))
    values = filled(layer)
    weight_gradient(layer, G)
    factors = torch.einsum("k,kij->ij", values[1], B), A0 + torch.einsum("k,kij->ij", values[0], A)
    close(alpha.grad, 2 * torch.einsum("ij,kij->k", factors[0].t() @ G.double(), A))
    close(beta.grad, 2 * torch.einsum("ij,kij->k", G.double() @ factors[1].t(), B))


def test_entries_of_a_sum_with_coefficients_of_one_have_variance_one_third():
    _, (layer,) = on("nola", random(200, 300), r=8, k=64)
    _, A, _ = bases(layer)
    assert abs(3 * A.sum(0).var().item() - 1) < 0.1  # a forgotten 1/sqrt(k) gives 64


def test_numbers_are_2_k_a_module_whatever_rank_and_width_and_nothing_else_is_stored(tmp_path):
    for r in (3, 6):
        model, _ = on("nola", W, random(8, 12, seed=1), **{**OPTIONS, "r": r})
        assert [p.numel() for p in trained(model).values()] == [5] * 4
    model.save_pretrained(tmp_path)
    kinds = {key.rpartition("lora_")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert kinds == {"A_coefficients", "B_coefficients", "shape"}


def test_forward_and_backward_leave_torchs_generator_and_layers_have_matrices_of_their_own():
    model, layers = on("nola", W, random(10, 12, seed=1), random(12, 10, seed=2), **OPTIONS)
    state = torch.get_rng_state()
    model(random(4, 10, seed=3)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(bases(layers[0])[1], bases(layers[2])[1])


def test_the_mean_form_starts_away_from_the_base():
    _, (layer,) = on("nola", W, init="mean", **OPTIONS)
    site = layer.site("default")
    A = seeded_uniform(site.stream("A"), 5, 3, 10).double().mean(0) / 10**0.5
    B = seeded_uniform(site.stream("B"), 5, 12, 3).double().mean(0) / 3**0.5
    close(layer.get_delta_weight("default"), 2 * B @ A)


def test_a_loaded_adapter_and_the_exported_lora_answer_alike(tmp_path):
    model, (layer,) = on("nola", W, **OPTIONS)
    filled(layer)
    x = random(4, 10, seed=3)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(PeftModel.from_pretrained(Linears(W), tmp_path / "adapter")(x), model(x))
    assert hub.export_lora(model, tmp_path / "lora").ranks == {"lin.0": 3}
    close(PeftModel.from_pretrained(Linears(W), tmp_path / "lora")(x), model(x))
