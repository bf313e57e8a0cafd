"""LoLDU (Shi et al., 2024; official code SKDDJ/LoLDU) against its equations, in float64."""

import pytest
import torch
from peft import PeftModel
from spectral_toolbox import Linears, close, on, random, tensors, trained, weight_gradient

from hf_sparse_peft import hub

W = random(10, 8)
OPTIONS = {"r": 3, "lora_alpha": 6}


def eliminated(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P L `[out, n]`, D `[n]` and the unit upper U `[n, in]` by Gaussian elimination with partial pivoting."""
    left, rows = W.double().clone(), list(range(W.shape[0]))
    n = min(W.shape)
    L = torch.zeros(W.shape[0], n, dtype=torch.float64)
    for k in range(n):
        best = k + int(left[k:, k].abs().argmax())
        for held in (left, L):
            held[[k, best]] = held[[best, k]]
        rows[k], rows[best] = rows[best], rows[k]
        L[k, k] = 1
        for i in range(k + 1, W.shape[0]):
            L[i, k] = left[i, k] / left[k, k]
            left[i] -= L[i, k] * left[k]
    PL, D = torch.zeros_like(L), left.diagonal()[:n].clone()
    PL[rows] = L
    return PL, D, left[:n] / D[:, None]


def test_the_decomposition_is_the_weight_and_its_first_pivots_are_the_bases():
    PL, D, U = eliminated(W)
    close(PL @ torch.diag(D) @ U, W, 1e-12)
    _, (layer,) = on("loldu", W, **OPTIONS)
    held = tensors(layer)
    close(held["basis_B"], PL[:, :3])
    close(held["basis_A"], U[:3])
    close(held["core"], D[:3])
    assert held["scale"].tolist() == [2.0]


@pytest.mark.parametrize("init", ["values", "values_uniform", "values_normal", "values_mean"])
def test_starts_after_the_pivots_are_the_base_to_the_last_bit(init):
    _, (layer,) = on("loldu", W, init=init, **OPTIONS)
    assert not layer.get_delta_weight("default").any()
    x = random(4, 8, seed=1)
    assert torch.equal(layer(x), layer.base_layer(x))
    D, z = eliminated(W)[1][:3], tensors(layer)["core"]
    mean = D.mean()
    if init == "values_mean":
        close(z, mean.expand(3))
    elif init == "values_uniform":
        assert z.unique().numel() == 3
        assert (z.abs() <= mean.abs() / 2).all()
    assert (init == "values") == torch.allclose(z, D)


@pytest.mark.parametrize(("init", "value"), [("ones", 1.0), ("zeros", 0.0)])
def test_other_starts_are_away_from_the_base_by_what_the_pivots_lack(init, value):
    _, (layer,) = on("loldu", W, init=init, **OPTIONS)
    PL, D, U = eliminated(W)
    close(layer.get_delta_weight("default"), 2 * PL[:, :3] @ torch.diag(value - D[:3]) @ U[:3])


def test_the_worked_example():
    model, (layer,) = on("loldu", torch.tensor([[0.0, 2.0], [4.0, 8.0]]), r=1, lora_alpha=1)
    held = tensors(layer)
    assert held["core"].tolist() == [4.0]
    assert held["basis_A"].tolist() == [[1.0, 2.0]]
    assert held["basis_B"].tolist() == [[0.0], [1.0]]
    layer.spectral_lora_core["default"].data.fill_(5.0)
    assert layer.get_delta_weight("default").tolist() == [[0.0, 0.0], [1.0, 2.0]]
    assert sum(p.numel() for p in trained(model).values()) == 2


def test_gradients_of_pivots_and_scaling():
    _, (layer,) = on("loldu", W, **OPTIONS)
    z, s = layer.spectral_lora_core["default"], layer.spectral_lora_scale["default"]
    z.data.copy_(random(3, seed=2))
    s.data.fill_(1.7)
    PL, D, U = eliminated(W)
    expected = PL[:, :3] @ torch.diag(1.7 * z.detach().double() - 2 * D[:3]) @ U[:3]
    close(layer.get_delta_weight("default"), expected)
    G = random(10, 8, seed=3)
    weight_gradient(layer, G)
    slopes = torch.stack([PL[:, k] @ G.double() @ U[k] for k in range(3)])
    close(z.grad, 1.7 * slopes)
    close(s.grad, (slopes * z.detach().double()).sum().view(1))


def test_the_exported_lora_answers_alike_on_the_original_base(tmp_path):
    model, (layer,) = on("loldu", W, **OPTIONS)
    layer.spectral_lora_core["default"].data.copy_(random(3, seed=2))
    layer.spectral_lora_scale["default"].data.fill_(-0.4)
    assert hub.export_lora(model, tmp_path).ranks == {"lin.0": 3}
    x = random(4, 8, seed=1)
    close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x))


def test_a_singular_weight_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'lin\.0' has rank 1 in its first 3 pivots"):
        on("loldu", torch.ones(10, 8), **OPTIONS)
