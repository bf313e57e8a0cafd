"""LoRA-XS (Bałazy et al., 2024; official code MohammadrezaBanaei/LoRA-XS) against its equations, in float64."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, on, random, tensors, trained, weight_gradient

from hf_sparse_peft import hub
from hf_sparse_peft.sparsity.decomposition import truncated_svd
from hf_sparse_peft.tuners.spectral_lora import found as found_bases

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


# Bases that no file has


def unsaved():
    model, (layer,) = on("lora-xs", W, saved=False, **OPTIONS)
    layer.spectral_lora_core["default"].data.copy_(random(4, 4, seed=2))
    return model, layer


def test_a_file_without_bases_has_r_squared_and_2_r_numbers_and_finds_them_in_the_base(tmp_path):
    model, layer = unsaved()
    _, (other,) = on("lora-xs", W, **OPTIONS)
    other.spectral_lora_core["default"].data.copy_(random(4, 4, seed=2))
    close(layer.get_delta_weight("default"), other.get_delta_weight("default"))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for t in held.values() if t.is_floating_point()) == 16 + 8
    x = random(5, 16, seed=4)
    loaded = PeftModel.from_pretrained(Linears(W), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert hub.export_lora(loaded, tmp_path / "lora").ranks == {"lin.0": 4}


def test_signs_of_another_library_are_put_right_and_other_vectors_refused(tmp_path, monkeypatch):
    model, _ = unsaved()
    model.save_pretrained(tmp_path)
    x = random(5, 16, seed=4)
    answer = model(x)
    turned = torch.tensor([1.0, -1, -1, 1])

    def other_signs(matrix, rank):
        U, S, Vh = truncated_svd(matrix, rank)
        return U * turned, S, Vh * turned[:, None]

    monkeypatch.setattr(found_bases, "truncated_svd", other_signs)
    close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), answer)
    again, _ = unsaved()  # its own bases have other signs now, until the file is loaded into it
    assert not torch.allclose(again(x), answer, atol=1e-3)
    again.load_adapter(tmp_path, "default")
    close(again(x), answer)
    with pytest.raises(ValueError, match=r"singular vectors of 'lin\.0' here are not those that"):
        PeftModel.from_pretrained(Linears(random(24, 16, seed=9)), tmp_path)(x)
