"""LaMDA (Azizi et al., 2024; official code ArminAzizi98/LaMDA, incomplete) against its equations, in float64."""

import itertools

import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, on, random, tensors, weight_gradient

from hf_sparse_peft import FreezeGradually, callbacks_for, hub, methods
from hf_sparse_peft.tuners.spectral_lora import spectral_layers

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
