"""LaMDA (Azizi et al., 2024; official code ArminAzizi98/LaMDA, incomplete) against its equations, in float64."""

import itertools
from functools import partial

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, on, random, tensors, weight_gradient

from hf_sparse_peft import FreezeGradually, callbacks_for, hub, methods
from hf_sparse_peft.tuners.spectral_lora import SpectrumSpread, spectral_layers
from hf_sparse_peft.tuners.spectral_lora.bases import Site

W = random(12, 10)
OPTIONS = {"r": 3, "lora_alpha": 6}


def test_it_starts_at_the_base_with_the_values_in_the_core():
    _, (layer,) = on("lamda", W, **OPTIONS)
    held, x = tensors(layer), random(4, 10, seed=1)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert not layer.get_delta_weight("default").any()
    S = torch.linalg.svdvals(W.double())[:3]
    close(held["core"], torch.diag(S))
    residual = W.double() - 2 * held["B"] @ held["core"] @ held["basis_A"]
    close(residual + 2 * held["B"] @ held["core"] @ held["basis_A"], W.double(), 1e-12)
    close(held["offset"], held["B"] @ held["core"])


def test_gradients_are_those_of_s_b_s_a_and_a_has_none():
    _, (layer,) = on("lamda", W, **OPTIONS)
    layer.spectral_lora_core["default"].data.copy_(random(3, 3, seed=2))
    layer.spectral_lora_B["default"].data.copy_(random(12, 3, seed=3))
    held, G = tensors(layer), random(12, 10, seed=4)
    expected = 2 * (held["B"] @ held["core"] - held["offset"]) @ held["basis_A"]
    close(layer.get_delta_weight("default"), expected)
    weight_gradient(layer, G)
    close(layer.spectral_lora_core["default"].grad, 2 * held["B"].t() @ G.double() @ held["basis_A"].t())
    close(layer.spectral_lora_B["default"].grad, 2 * G.double() @ held["basis_A"].t() @ held["core"].t())
    assert not layer.spectral_lora_basis_A["default"].requires_grad


def test_frozen_columns_of_the_papers_schedule():
    rule = FreezeGradually(0.3)
    found = [rule.frozen(8, t, 100) for t in range(100)]
    assert found[:5] == [0, 0, 0, 0, 1]  # the released count, without the factor r, is 0 here
    assert (found[15], found[29]) == (4, 7)
    assert set(found[30:]) == {8}
    assert found == sorted(found)


def test_columns_freeze_from_the_largest_value_on_and_stay_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    method = methods.get("lamda", r=4, until=0.5, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, seen = get_peft_model(tiny.base(), method.config), []

    def look(step, model, optimizer):
        held = spectral_layers(model)[0].tensors("default")
        seen.append([held[f"spectral_lora_{name}"].detach().clone() for name in ("B", "core")])

    look(0, model, None)
    callbacks = [*callbacks_for(model), tiny.At(on_step_end=look)]
    tiny.train(model, tmp_path, 8, callbacks=callbacks, weight_decay=0.1)
    steps = list(itertools.pairwise(seen))
    moved = [(after[0] != before[0]).any(0).tolist() for before, after in steps]
    assert moved == [[k >= min(4, t) for k in range(4)] for t in range(8)]
    assert all(not torch.equal(before[1], after[1]) for before, after in steps)
    core = seen[1][1]
    assert (core - torch.diag(core.diagonal())).abs().max() > 0


def test_files_have_the_core_and_the_lora_answers_alike_on_the_original_base(tmp_path):
    model, (layer,) = on("lamda", W, **OPTIONS)
    layer.spectral_lora_core["default"].data.copy_(random(3, 3, seed=2))
    layer.spectral_lora_B["default"].data.copy_(random(12, 3, seed=3))
    x = random(4, 10, seed=1)
    model.save_pretrained(tmp_path / "adapter")
    assert any(key.endswith("_core") for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert torch.equal(PeftModel.from_pretrained(Linears(W), tmp_path / "adapter")(x), model(x))
    assert hub.export_lora(model, tmp_path / "lora").ranks == {"lin.0": 3}
    close(PeftModel.from_pretrained(Linears(W), tmp_path / "lora")(x), model(x))


def energy_of(weight: torch.Tensor, r: int) -> float:
    values = torch.linalg.svdvals(weight.double()).square()
    return float(values[:r].sum() / values.sum())


def test_lamda_plus_plus_gives_the_modules_that_r_components_hold_worst_the_largest_ranks(tmp_path):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    base = tiny.base()
    for at, module in enumerate(m for n, m in base.named_modules() if n.rpartition(".")[2] in targets):
        scales = torch.arange(1.0, min(module.weight.shape) + 1) ** (-0.3 * (at * 3 % 7))
        U, _, Vh = torch.linalg.svd(module.weight.data, full_matrices=False)
        module.weight.data = (U * scales) @ Vh
    weights = {n: m.weight.data.clone() for n, m in base.named_modules() if n.rpartition(".")[2] in targets}
    model = get_peft_model(base, methods.get("lamda++", r=4, target_modules=targets).config)
    found = {layer.module_name: layer.spectral_lora_core["default"].shape[0] for layer in spectral_layers(model)}
    assert found.keys() == weights.keys()
    for block in ("layers.0.", "layers.1."):
        names = [name for name in weights if block in name]
        by_energy = sorted(names, key=lambda name: energy_of(weights[name], 4))
        assert [found[name] for name in by_energy] == [6, 6, 4, 4, 4, 2, 2]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.base(), tmp_path)
    assert {one.module_name: one.spectral_lora_core["default"].shape[0] for one in spectral_layers(again)} == found


@pytest.mark.parametrize("modules", range(1, 9))
@pytest.mark.parametrize("multiples", [(0.5, 1.5), (0.5, 1.0, 1.5), (0.25, 0.75, 1.25, 1.75)])
def test_lamda_plus_plus_keeps_the_total_whatever_the_number_of_modules(modules, multiples):
    weights = {f"h.0.m{at}": partial(random, 40, 32, seed=at) for at in range(modules)}
    sites = {name: Site(name, 40, 32, 8, None, 0) for name in weights}
    found = SpectrumSpread(multiples).ranks(weights, sites)
    assert sum(found.values()) == 8 * modules
    energies = [energy_of(weights[name](), 8) for name in weights]
    ranks = [found[name] for _, name in sorted(zip(energies, weights, strict=True))]
    assert ranks == sorted(ranks, reverse=True)
    if modules > 3:
        assert (ranks[0], ranks[-1]) == (8 * multiples[-1], 8 * multiples[0])


@pytest.mark.parametrize("multiples", [(1.0,), (1.5, 0.5), (0.5, 1.0), (0.5, 1.0, 1.4)])
def test_candidates_that_would_change_the_total_are_refused(multiples):
    with pytest.raises(ValueError, match=r"SpectrumSpread\.multiples.*symmetric around 1"):
        SpectrumSpread(multiples)
