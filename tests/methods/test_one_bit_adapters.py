"""1-bit adapters (Jie et al., 2023; official code JieShibo/PETL-ViT) against their equations, in float64."""

import copy
import itertools
import statistics

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, random
from structured_toolbox import held, on

from hf_sparse_peft import StructuredConfig, hub
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.tuners.structured import PackedMatrix, Quantised, structured_layers
from hf_sparse_peft.tuners.structured.quantised import codes_of
from hf_sparse_peft.utils.checksums import save_checked


def reference_codes(bits):
    """The fixed point, by the standard library's normal distribution."""
    normal = statistics.NormalDist()
    values = [0.01 * at for at in range(2**bits)]
    for _ in range(2000):
        bounds = [0.0, *(normal.cdf((a + b) / 2) for a, b in itertools.pairwise(values)), 1.0]
        values = [normal.inv_cdf((a + b) / 2) for a, b in itertools.pairwise(bounds)]
    return torch.tensor(values, dtype=torch.float64)


def rounded(V, bits):
    """Float64, entry by entry."""
    values, mean, deviation = reference_codes(bits), V.mean(), V.std(correction=1)
    z = (V - mean) / (deviation + 1e-5)
    nearest = (z.reshape(-1, 1) - values).abs().argmin(1)
    return values[nearest].view(V.shape) * deviation + mean


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_are_the_fixed_point(bits):
    values, thresholds = codes_of(bits)
    close(values, reference_codes(bits), 1e-7)
    close(thresholds, (values[1:] + values[:-1]) / 2, 1e-12)


def test_codes_of_one_and_two_bits():
    close(codes_of(1)[0], torch.tensor([-0.67448975, 0.67448975]), 1e-7)  # the least square error has 0.79788
    close(codes_of(2)[0], torch.tensor([-1.26572033, -0.37775416, 0.37775416, 1.26572033]), 1e-7)
    close(codes_of(2)[1], torch.tensor([-0.82173724, 0.0, 0.82173724]), 1e-7)


def test_worked_matrix_takes_two_values():
    V = torch.tensor([[0.9, -0.1], [0.4, -0.6]])
    found = Quantised().dense("up", 2, 2, {"up_matrix": V})
    close(found, torch.tensor([[0.58538, -0.28538], [0.58538, -0.28538]]), 2e-5)
    assert found.unique().numel() == 2
    on_threshold = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert Quantised().dense("up", 2, 2, {"up_matrix": on_threshold}).unique().numel() == 2


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_the_output_is_that_of_the_rounded_matrices(kind, bits):
    W, x = random(16, 12), random(5, 12, seed=3)
    _, (layer,) = on("1-bit-adapters", W, fill=0.3, r=4, bits=bits, scale=0.7, kind=kind)
    layer.eval()
    tensors = {name: rounded(t, bits) for name, t in held(layer).items()}
    y = x.double() @ W.double().t()
    if kind == "lora":
        expected = y + 0.7 * x.double() @ tensors["a_matrix"].t() @ tensors["b_matrix"].t()
    else:
        expected = y + 0.7 * (y @ tensors["down_matrix"].t()).clamp_min(0) @ tensors["up_matrix"].t()
    close(layer(x), expected)


def test_gradients_pass_the_rounding_and_go_through_mean_and_deviation():
    form, V, G = Quantised(2), random(4, 6), random(4, 6, seed=1).double()
    parameter = V.clone().requires_grad_()
    (form.dense("up", 4, 6, {"up_matrix": parameter}) * G).sum().backward()
    wide = V.double().requires_grad_()
    mean, deviation = wide.mean(), wide.std(correction=1)
    z = (wide - mean) / (deviation + 1e-5)
    nearest = reference_codes(2)[(z.detach().reshape(-1, 1) - reference_codes(2)).abs().argmin(1)].view(4, 6)
    ((nearest + z - z.detach()) * deviation + mean).mul(G).sum().backward()
    close(parameter.grad, wide.grad)
    assert (parameter.grad - G).abs().max() > 0.01  # a plain straight-through estimator has G


def test_the_reading_matrix_starts_as_a_linear_layers_and_the_other_small_and_not_0():
    _, (layer,) = on("1-bit-adapters", random(256, 64))
    tensors = held(layer)
    assert 0.9 / 8 < tensors["a_matrix"].abs().max() <= 1 / 8
    assert 0.8e-3 < tensors["b_matrix"].std() < 1e-3
    assert tensors["b_matrix"].abs().max() <= 2e-3
    x = random(5, 64)
    assert not torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_the_packed_adapter_is_the_same_to_the_bit_and_a_bit_a_number_on_disk(kind, bits, tmp_path):
    weights = random(9, 7), random(7, 9, seed=1)
    model, _ = on("1-bit-adapters", *weights, fill=0.3, r=3, bits=bits, kind=kind)
    model.eval()
    x = random(5, 7, seed=3)
    answer = model(x)
    twin = copy.deepcopy(model.peft_config["default"])
    model.base_model.pack()
    assert torch.equal(model(x), answer)
    assert model.get_nb_trainable_parameters()[0] == 0
    assert twin.form.matrix == Quantised(bits)
    model.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    held_bytes = {
        name: t.nbytes for name, t in load_file(tmp_path / "adapter_model.safetensors").items() if "planes" in name
    }
    first, last = (3 * 7, 9 * 3) if kind == "lora" else (3 * 9, 9 * 3)
    role = {"lora": "ab", "adapter": ("down", "up")}[kind]
    prefix = "base_model.model.lin.0.structured_frozen_"
    assert held_bytes[f"{prefix}{role[0]}_planes"] == bits * -(-first // 8)
    assert held_bytes[f"{prefix}{role[1]}_planes"] == bits * -(-last // 8)
    loaded = PeftModel.from_pretrained(Linears(*weights), tmp_path)
    assert torch.equal(loaded(x), answer)
    assert structured_layers(loaded)[0].form("default").matrix == PackedMatrix(bits)
    if kind == "lora":
        done = hub.export_lora(loaded, tmp_path / "lora")
        assert done.errors == {"lin.0": 0.0, "lin.1": 0.0}
        close(PeftModel.from_pretrained(Linears(*weights), tmp_path / "lora")(x), answer)
        loaded.merge_adapter()
        close(loaded(x), answer)
        loaded.unmerge_adapter()
    with pytest.raises(ValueError, match=r"'lin\.0' cannot be packed: PackedMatrix is no matrix of a few values"):
        loaded.base_model.pack()


def test_packed_matrices_are_no_start_and_a_damaged_code_is_refused_by_name(tmp_path):
    model, _ = on("1-bit-adapters", random(9, 7), r=3)
    model.base_model.pack()
    with pytest.raises(ValueError, match=r"made of a trained adapter.*base_model\.pack\(\)"):
        on("1-bit-adapters", random(9, 7), form=model.peft_config["default"].form)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lin.0.structured_frozen_a_planes"][0, -1] |= 128
    save_checked(tensors, file)
    with pytest.raises(ValueError, match=r"a_planes' has bits beyond its 3 x 7 numbers"):
        PeftModel.from_pretrained(Linears(random(9, 7)), tmp_path)


def test_a_matrix_of_one_number_has_no_deviation():
    with pytest.raises(ValueError, match=r"'lin\.0' .*needs two numbers or more, and its matrix is 1 x 1"):
        on("1-bit-adapters", random(1, 1), r=1)
    assert StructuredConfig(form={"type": "factor_pair", "matrix": "quantised"}).form.matrix == Quantised()
