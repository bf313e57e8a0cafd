"""LoRA-SB (Ponkshe et al., 2024; official code RaghavSinghal10/lora-sb) against its equations, in float64."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from spectral_toolbox import close, on, random, tensors, trained, weight_gradient
from torch.utils.data import DataLoader

from hf_sparse_peft import callbacks_for, hub, methods
from hf_sparse_peft.training.calibration import calibrate
from hf_sparse_peft.tuners.spectral_lora import spectral_layers

W, ETA = random(12, 10), 0.01
OPTIONS = {"r": 3, "step_size": ETA}


def calibrated(G: torch.Tensor, **options):
    model, (layer,) = on("lora-sb", torch.zeros_like(G) + 1, **{**OPTIONS, **options})
    layer.take_calibration("default", {"mean": G.clone()})
    return model, layer


def test_the_start_is_the_best_approximation_of_the_signed_step_between_orthonormal_bases():
    G = random(12, 10, seed=1)
    _, layer = calibrated(G)
    held, D = tensors(layer), -ETA * G.sign().double()
    close(held["basis_B"].t() @ held["basis_B"], torch.eye(3))
    close(held["basis_A"] @ held["basis_A"].t(), torch.eye(3))
    delta = layer.get_delta_weight("default").double()
    close(delta, held["basis_B"] @ held["core"] @ held["basis_A"])
    values = torch.linalg.svdvals(D)
    assert ((D - delta).square().sum() / values[3:].square().sum() - 1).abs() < 1e-5
    close(held["core"], torch.diag(values[:3]))
    close((D * delta).sum(), delta.square().sum())


def test_the_worked_sign_pattern():
    signs = torch.tensor([[1.0, 1, 1], [1, -1, 1]])
    _, layer = calibrated(signs * torch.tensor([[3.0, 0.1, 2], [5, 7, 0.2]]), r=1)
    delta = layer.get_delta_weight("default").double()
    close(delta.square().sum() / ETA**2, torch.tensor(4.0))
    close((-ETA * signs.double() - delta).square().sum() / ETA**2, torch.tensor(2.0))


def test_entries_without_a_gradient_take_no_step_and_full_rank_changes_the_loss_by_the_l1_norm():
    G = random(8, 8, seed=1)
    G[2] = 0.0
    _, layer = calibrated(G, r=8)
    delta = layer.get_delta_weight("default").double()
    close(delta, -ETA * G.sign().double())
    close((G.double() * delta).sum(), -ETA * G.double().abs().sum())


def test_the_cores_gradient_is_the_projection_and_a_step_makes_it_full():
    G = random(12, 10, seed=1)
    model, layer = calibrated(G)
    held, other = tensors(layer), random(12, 10, seed=2)
    weight_gradient(layer, other)
    core = layer.spectral_lora_core["default"]
    close(core.grad, held["basis_B"].t() @ other.double() @ held["basis_A"].t())
    assert list(trained(model)) == ["lin.0.spectral_lora_core.default"]
    torch.optim.SGD([core], lr=0.1).step()
    assert (core - torch.diag(core.diagonal())).abs().max() > 0


def adapted(base: str = "fp32"):
    method = methods.get("lora-sb", r=4, step_size=1e-3, examples=8, target_modules=["q_proj", "down_proj"])
    return get_peft_model(tiny.base(base), method.config)


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_gradients_are_those_of_the_loss_on_the_training_data(base):
    model, data = adapted(base), tiny.TokenData(16)
    loader = DataLoader(data, batch_size=4)
    ids = torch.stack([data[at]["input_ids"] for at in range(8)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "spectral" not in name}
    with pytest.raises(ValueError, match="starts from data"):
        model.train()(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="Nothing to save"):
        model.save_pretrained("never")
    calibrate(model, loader, show_progress=False)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.parameters())
    dense = tiny.base() if base == "fp32" else hub.merge_to_dense(adapted(base).eval())
    for layer in spectral_layers(model):
        dense.get_submodule(layer.module_name).weight.requires_grad_()
    dense.float()(input_ids=ids, labels=ids).loss.backward()
    for layer in spectral_layers(model):
        D = -1e-3 * dense.get_submodule(layer.module_name).weight.grad.double().sign()
        U, S, Vh = torch.linalg.svd(D)
        expected = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
        close(layer.get_delta_weight("default"), expected, 1e-2)  # a gradient of nearly 0 may have another sign


def test_a_trainer_finds_the_bases_before_its_first_step_and_a_resumed_one_does_not(tmp_path):
    def run(folder, steps, resume=None, **options):
        torch.manual_seed(0)
        model = adapted()
        tiny.train(model, folder, steps, callbacks=callbacks_for(model), resume=resume, **options)
        return {name: p.detach().clone() for name, p in model.state_dict().items() if "spectral" in name}, model

    whole, model = run(tmp_path / "run", 6, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
    assert all(tensor.any() for tensor in whole.values())
    resumed, _ = run(tmp_path / "run", 6, str(tmp_path / "run" / "checkpoint-3"), lr_scheduler_type="constant")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12).view(1, 12)
    loaded = PeftModel.from_pretrained(tiny.base(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert set(hub.export_lora(model, tmp_path / "lora").ranks.values()) == {4}


def test_a_layer_of_which_the_data_says_nothing_starts_at_the_base():
    _, (layer,) = on("lora-sb", W, **OPTIONS)
    layer.take_calibration("default", None)
    assert not layer.get_delta_weight("default").any()
    assert not layer.awaits_calibration("default")
    close(
        tensors(layer)["basis_B"].t() @ W.double() @ tensors(layer)["basis_A"].t(),
        torch.diag(torch.linalg.svdvals(W.double())[:3]),
    )
