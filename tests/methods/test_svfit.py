"""SVFit (Sun et al., 2024): what the abstract says of the split and of what trains, in float64. Its other details are
this project's reading and are not claimed to be the authors'."""

import pytest
import torch
from peft import PeftModel
from spectral_toolbox import Linears, close, on, random, tensors, trained, weight_gradient

from hf_sparse_peft import hub
from hf_sparse_peft.tuners.spectral_lora import SVD, Energy

W = random(24, 16)


def test_it_starts_at_the_base_to_the_last_bit_and_trains_r_numbers_a_module():
    model, layers = on("svfit", W, random(8, 24, seed=1), r=5)
    x = random(3, 16, seed=2)
    assert torch.equal(model(x), Linears(W, random(8, 24, seed=1))(x))
    assert all(not layer.get_delta_weight("default").any() for layer in layers)
    assert [p.numel() for p in trained(model).values()] == [5, 5]


def test_the_gradient_of_a_value_is_that_of_its_singular_direction():
    _, (layer,) = on("svfit", W, r=5)
    G = random(24, 16, seed=3)
    weight_gradient(layer, G)
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    expected = torch.stack([U[:, k] @ G.double() @ Vh[k] for k in range(5)])
    close(layer.spectral_lora_core["default"].grad, expected)


def test_the_worked_example_moves_the_largest_value_and_nothing_else():
    W, G = torch.diag(torch.tensor([4.0, 2.0, 1.0])), torch.tensor([[1.0, 9, 9], [9, 3, 9], [9, 9, 5]])
    _, (layer,) = on("svfit", W, r=1)
    weight_gradient(layer, G)
    core = layer.spectral_lora_core["default"]
    assert core.grad.item() == 1.0
    torch.optim.SGD([core], lr=0.1).step()
    close(W + layer.get_delta_weight("default"), torch.diag(torch.tensor([3.9, 2.0, 1.0])))


def test_after_training_the_update_is_diagonal_in_the_singular_basis_and_leaves_exactly(tmp_path):
    model, (layer,) = on("svfit", W, r=5)
    values = random(5, seed=4)
    values[2] = 0.0  # a value that did not move is no component of the LoRA
    layer.spectral_lora_core["default"].data.copy_(values)
    U, _, Vh = torch.linalg.svd(W.double())
    inside = U.t() @ layer.get_delta_weight("default").double() @ Vh.t()
    expected = torch.zeros(24, 16, dtype=torch.float64)
    expected[range(5), range(5)] = values.double()
    close(inside, expected)
    assert set(tensors(layer)) == {"basis_A", "basis_B", "core", "shape"}
    assert hub.export_lora(model, tmp_path).ranks == {"lin.0": 4}
    x = random(3, 16, seed=2)
    close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x))


@pytest.mark.parametrize(("energy_of", "components"), [("squares", 2), ("values", 3)])
def test_components_hold_the_energy_asked_for_in_each_weight_and_are_r_at_most(energy_of, components, tmp_path):
    W = torch.diag(torch.tensor([6.0, 3.0, 1.0]))  # squares: 36, 45, 46 of 46; values: 6, 9, 10 of 10
    bases = SVD(ranks=Energy(0.95, energy_of))
    _, (layer,) = on("svfit", W, r=8, bases=bases)
    assert layer.spectral_lora_core["default"].numel() == components
    model, (layer,) = on("svfit", W, r=1, bases=bases)
    assert layer.spectral_lora_core["default"].tolist() == [0.0]
    layer.spectral_lora_core["default"].data.fill_(1.0)
    model.save_pretrained(tmp_path)
    x = random(3, 3)
    assert torch.equal(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x))
