"""LoRA-XS (Bałazy et al., 2024; official code MohammadrezaBanaei/LoRA-XS) against its equations, in float64."""

import torch
from peft import PeftModel
from spectral_toolbox import Linears, close, on, random, tensors, trained, weight_gradient

from hf_sparse_peft import hub

W = random(24, 16)
OPTIONS = {"r": 4, "lora_alpha": 16}


def test_bases_are_the_truncated_svd_with_the_values_on_the_input_side():
    _, (layer,) = on("lora-xs", W, **OPTIONS)
    held = tensors(layer)
    A, B = held["basis_A"], held["basis_B"]
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    close(B.t() @ B, torch.eye(4))
    close(A @ A.t(), torch.diag(S[:4] ** 2))
    close(B @ A, U[:, :4] @ torch.diag(S[:4]) @ Vh[:4])  # the best approximation of rank 4


def test_the_core_starts_at_a_millionth_and_is_all_that_trains():
    model, layers = on("lora-xs", W, random(8, 24, seed=1), **OPTIONS)
    assert {name: tuple(p.shape) for name, p in trained(model).items()} == {
        f"lin.{at}.spectral_lora_core.default": (4, 4) for at in range(2)
    }
    assert model.get_nb_trainable_parameters()[0] == 2 * 4**2
    started = torch.cat([layer.spectral_lora_core["default"].flatten() for layer in layers])
    assert 0.5e-5 < started.std() < 1.5e-5


def test_the_update_is_alpha_over_r_times_b_r_a_and_so_is_its_gradient():
    _, (layer,) = on("lora-xs", W, **OPTIONS)
    layer.spectral_lora_core["default"].data.copy_(random(4, 4, seed=2))
    held = tensors(layer)
    close(layer.get_delta_weight("default"), 16 / 4 * held["basis_B"] @ held["core"] @ held["basis_A"])
    G = random(24, 16, seed=3)
    weight_gradient(layer, G)
    close(layer.spectral_lora_core["default"].grad, 4 * held["basis_B"].t() @ G.double() @ held["basis_A"].t())
    x = random(5, 16, seed=4)
    close(layer(x), x.double() @ (W.double() + layer.get_delta_weight("default").double()).t())


def test_the_exported_lora_is_of_rank_r_and_answers_alike(tmp_path):
    model, (layer,) = on("lora-xs", W, **OPTIONS)
    layer.spectral_lora_core["default"].data.copy_(random(4, 4, seed=2))
    done = hub.export_lora(model, tmp_path)
    assert done.ranks == {"lin.0": 4}
    assert done.errors == {"lin.0": 0.0}
    x = random(5, 16, seed=4)
    close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x))
