"""EDoRA (Nasiri & Garraghan, 2025; official code Hamid-Nasiri/EDoRA) against its equations, in float64."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from spectral_toolbox import Linears, close, on, random, tensors, trained, weight_gradient

from hf_sparse_peft import hub, methods
from hf_sparse_peft.tuners.spectral_lora import SharedBases

W = random(12, 10)
OPTIONS = {"r": 3, "lora_alpha": 6}


def filled(layer) -> dict[str, torch.Tensor]:
    layer.spectral_lora_core["default"].data.copy_(random(3, 3, seed=2) * 0.3)
    layer.spectral_lora_magnitude["default"].data.mul_(1 + 0.2 * random(12, seed=3))
    return tensors(layer)


def moved(held: dict[str, torch.Tensor]) -> torch.Tensor:
    """W + s B R A, float64."""
    return W.double() + 2 * held["basis_B"] @ held["core"] @ held["basis_A"]


def test_it_starts_near_the_base_and_with_a_core_of_zero_at_it():
    _, (layer,) = on("edora", W, **OPTIONS)
    x = random(4, 10, seed=1)
    near = layer(x)
    assert not torch.equal(near, layer.base_layer(x))
    close(near, layer.base_layer(x), 1e-4)
    layer.spectral_lora_core["default"].data.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_rows_have_the_trained_norms_whatever_the_core(tmp_path):
    _, (layer,) = on("edora", W, **OPTIONS)
    held = filled(layer)
    V = moved(held)
    expected = V / V.norm(dim=1, keepdim=True) * held["magnitude"][:, None]
    close(W + layer.get_delta_weight("default"), expected)
    close((W + layer.get_delta_weight("default")).norm(dim=1), held["magnitude"].abs())
    x = random(4, 10, seed=1)
    close(layer(x), x.double() @ expected.t())


def test_gradients_take_the_norm_for_a_constant():
    _, (layer,) = on("edora", W, **OPTIONS)
    held, G = filled(layer), random(12, 10, seed=4)
    V = moved(held)
    n = V.norm(dim=1)
    weight_gradient(layer, G)
    close(layer.spectral_lora_magnitude["default"].grad, (G.double() * V).sum(1) / n)
    scaled = (held["magnitude"] / n)[:, None] * G.double()
    close(layer.spectral_lora_core["default"].grad, 2 * held["basis_B"].t() @ scaled @ held["basis_A"].t())


def test_numbers_are_r_squared_and_a_norm_a_row_and_the_bases_are_lora_xs():
    model, (layer,) = on("edora", W, **OPTIONS)
    assert model.get_nb_trainable_parameters()[0] == 9 + 12
    assert set(trained(model)) == {"lin.0.spectral_lora_core.default", "lin.0.spectral_lora_magnitude.default"}
    held = tensors(layer)
    close(held["magnitude"], W.double().norm(dim=1))
    close(held["basis_B"].t() @ held["basis_B"], torch.eye(3))
    close(held["basis_A"] @ held["basis_A"].t(), torch.diag(torch.linalg.svdvals(W.double())[:3] ** 2))


def test_it_leaves_as_upstreams_dora_exactly_and_merges(tmp_path):
    model, (layer,) = on("edora", W, **OPTIONS)
    filled(layer)
    x = random(4, 10, seed=1)
    answer = model(x)
    assert hub.export_lora(model, tmp_path / "dora").errors == {"lin.0": 0.0}
    assert "As a plain DoRA, without loss" in str(hub.adapter_card(model))
    loaded = PeftModel.from_pretrained(Linears(W), tmp_path / "dora")
    assert loaded.peft_config["default"].use_dora
    close(loaded(x), answer)
    with pytest.warns(UserWarning, match="cut updates to rank 2"):
        hub.export_lora(model, tmp_path / "lora", rank=2)
    assert not PeftModel.from_pretrained(Linears(W), tmp_path / "lora").peft_config["default"].use_dora
    model.merge_adapter()
    close(model(x), answer)
    model.unmerge_adapter()
    assert torch.equal(model(x), answer)


@pytest.mark.parametrize("base", ["bf16", "nf4", "conv1d"])
def test_on_other_bases_the_layer_is_its_equation_with_the_dequantised_weight_and_without_its_bias(base):
    targets = ["c_attn"] if base == "conv1d" else ["q_proj"]
    model = get_peft_model(tiny.base(base), methods.get("edora", target_modules=targets, **OPTIONS).config)
    layer = next(module for module in model.modules() if hasattr(module, "spectral_lora_core"))
    layer.spectral_lora_core["default"].data.copy_(random(3, 3, seed=2))
    layer.spectral_lora_magnitude["default"].data.mul_(1.5)
    base_weight = layer.dense_base_weight().double()
    held = tensors(layer)
    V = base_weight + 2 * held["basis_B"] @ held["core"] @ held["basis_A"]
    expected = V / V.norm(dim=1, keepdim=True) * held["magnitude"][:, None]
    x = random(4, layer.in_features, seed=1).to(torch.bfloat16 if base == "bf16" else torch.float32)
    bias = layer.base_layer.bias
    found = layer(x).double() - (0 if bias is None else bias.double())
    close(found, x.double() @ expected.t(), 2e-2 if base == "bf16" else 1e-4)


def test_norms_follow_a_basis_that_is_trained():
    bases = SharedBases("A", init="normal")
    _, (layer,) = on("edora", W, bases=bases, core=None, **OPTIONS)
    for seed in (5, 6):  # no norm of the first may be left for the second
        layer.spectral_lora_A["default"].data.copy_(random(3, 10, seed=seed))
        layer.spectral_lora_B["default"].data.copy_(random(12, 3, seed=seed + 2))
        held = tensors(layer)
        V = W.double() + 2 * held["B"] @ held["A"]
        expected = V / V.norm(dim=1, keepdim=True) * held["magnitude"][:, None]
        x = random(4, 10, seed=1)
        close(layer(x), x.double() @ expected.t())
