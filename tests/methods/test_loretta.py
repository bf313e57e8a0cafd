"""LoRETTA (Yang et al., 2024; official code yifanycc/loretta) against its equations, in float64."""

import pytest
import torch
from peft import PeftModel
from spectral_toolbox import Linears, close, random, weight_gradient
from structured_toolbox import held, on

from hf_sparse_peft import hub, methods
from hf_sparse_peft.tuners.structured import TensorTrain


def contracted(cores, cols, rows):
    """`[cols, rows]`, by one einsum over all cores."""
    letters = "abcdefgh"
    axes, ranks = letters[: len(cores)], "zyxwvuts"
    terms = ",".join(f"{ranks[k]}{axes[k]}{ranks[k + 1]}" for k in range(len(cores)))
    return torch.einsum(f"{terms}->{axes}", *cores).reshape(cols, rows)


def cores_of(tensors, role):
    return [tensors[f"{role}_core_{at}"] for at in range(len([n for n in tensors if n.startswith(f"{role}_core")]))]


def test_numbers_of_the_published_shapes():
    W = random(768, 768)
    _, (layer,) = on("loretta-rep", W, norms=False)
    tensors = held(layer)
    for role in "ab":
        assert [tuple(core.shape) for core in cores_of(tensors, role)] == [(1, 8, 5), (5, 8, 5), (5, 12, 5), (5, 8, 1)]
        assert sum(core.numel() for core in cores_of(tensors, role)) == 580  # LoRA: 6,144
    assert TensorTrain().axes(4096, 8) == TensorTrain().axes(8, 4096) == (16, 16, 8, 4, 4)
    assert TensorTrain().axes(1024, 8) == (4, 8, 8, 8, 4)
    assert TensorTrain().axes(64, 4096) == (16, 16, 16, 4, 4, 4)
    assert TensorTrain().axes(3072, 8) == (16, 16, 12, 8)  # in no published table


def test_the_matrix_is_the_contraction_read_row_by_row_and_not_its_transpose():
    form, rows, cols = TensorTrain(3), 8, 768
    tensors = {s.name: random(*s.shape, seed=at).double() for at, s in enumerate(form.specs("a", rows, cols))}
    expected = contracted(cores_of(tensors, "a"), cols, rows)
    found = form.dense("a", rows, cols, tensors)
    close(found.t(), expected, 1e-12)
    other = contracted(cores_of(tensors, "a"), rows, cols)
    assert (found - other).norm() > 0.1 * found.norm()
    unfolding = found.t().reshape(8, -1)
    assert torch.linalg.matrix_rank(unfolding) <= 3


def test_a_chain_of_full_rank_is_any_matrix():
    form = TensorTrain(16, shapes={"8x6": [2, 4, 3, 2]})
    matrix, left, tensors = random(8, 6).double(), random(8, 6).double().reshape(1, -1), {}
    shapes = {s.name: s.shape for s in form.specs("a", 6, 8)}
    for at, length in enumerate((2, 4, 3, 2)):  # TT-SVD
        rank = shapes[f"a_core_{at}"][0]
        if at == 3:
            tensors[f"a_core_{at}"] = left.reshape(-1, length, 1)
            break
        U, S, Vh = torch.linalg.svd(left.reshape(left.shape[0] * length, -1), full_matrices=False)
        tensors[f"a_core_{at}"] = U.reshape(-1, length, len(S))
        left = S[:, None] * Vh
        assert len(S) <= 16
        assert rank in (1, 16)
    close(form.dense("a", 6, 8, tensors).t(), matrix, 1e-12)


def test_entries_start_with_the_variance_of_one_over_both_sides():
    torch.manual_seed(0)
    form, sums = TensorTrain(5), 0.0
    for _ in range(2000):
        tensors = {s.name: s.allocate() for s in form.specs("a", 8, 768)}
        sums += form.dense("a", 8, 768, tensors).square().mean().item()
    assert abs(sums / 2000 * (768 + 8) - 1) < 0.05


def test_the_update_is_the_product_of_both_chains_by_alpha_over_r_and_leaves_as_a_lora(tmp_path):
    W = random(16, 12)
    model, (layer,) = on("loretta-rep", W, fill=0.3, r=4, lora_alpha=6, norms=False)
    tensors = held(layer)
    A = contracted(cores_of(tensors, "a"), 12, 4).t()
    B = contracted(cores_of(tensors, "b"), 4, 16).t()
    x = random(5, 12, seed=3)
    close(layer(x), x.double() @ (W.double() + 1.5 * B @ A).t())
    done = hub.export_lora(model, tmp_path)
    assert (done.ranks, done.errors) == ({"lin.0": 4}, {"lin.0": 0.0})
    close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x))
    gradient = random(16, 12, seed=4)
    weight_gradient(layer, gradient)
    wide = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    update = contracted(cores_of(wide, "b"), 4, 16).t() @ contracted(cores_of(wide, "a"), 12, 4).t()
    (1.5 * update * gradient.double()).sum().backward()
    for name, tensor in layer.form_tensors("default").items():
        close(tensor.grad, wide[name].grad)


def test_the_start_is_not_the_base_and_with_a_zero_core_it_is():
    W, x = random(16, 12), random(5, 12, seed=3)
    _, (layer,) = on("loretta-rep", W, r=4, norms=False)
    assert not torch.equal(layer(x), layer.base_layer(x))
    _, (layer,) = on("loretta-rep", W, r=4, norms=False, zero_last=True)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_an_adapter_of_chains_is_a_relu_between_two_of_them_behind_the_layer():
    W = random(16, 12)
    _, (layer,) = on("loretta-adp", W, fill=0.3, size=4, norms=False)
    tensors, x = held(layer), random(5, 12, seed=3)
    y = x.double() @ W.double().t()
    inner = (y @ contracted(cores_of(tensors, "down"), 16, 4) + tensors["down_bias"]).clamp_min(0)
    close(layer(x), y + inner @ contracted(cores_of(tensors, "up"), 4, 16) + tensors["up_bias"])
    config = methods.get("loretta-adp").config
    assert (config.form.size, config.form.activation, config.form.matrix) == (64, "relu", TensorTrain(5))


def test_shapes_of_ones_own_travel_in_the_file_and_wrong_ones_are_refused(tmp_path):
    W = random(16, 12)
    form = {"type": "factor_pair", "r": 4, "matrix": {"type": "tensor_train", "rank": 2, "shapes": {"12x4": [6, 8]}}}
    model, (layer,) = on("loretta-rep", W, form=form, norms=False)
    assert [tuple(core.shape) for core in cores_of(held(layer), "a")] == [(1, 6, 2), (2, 8, 1)]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Linears(W), tmp_path)
    x = random(5, 12)
    assert torch.equal(loaded(x), model(x))
    form["matrix"]["shapes"] = {"12x4": [6, 7]}
    with pytest.raises(ValueError, match=r"'lin\.0' .*shapes\['12x4'\]=\[6, 7\] makes 42 numbers.*has 48"):
        on("loretta-rep", W, form=form, norms=False)


def test_chains_are_contracted_in_fp32_under_autocast():
    _, (layer,) = on("loretta-rep", random(64, 64), fill=0.3, r=4, norms=False)
    form, tensors, x = layer.form("default"), layer.form_tensors("default"), random(5, 64, seed=3)
    B, A = form.factors(tensors, layer.site("default"))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = layer(x) - layer.base_layer(x)
    expected = (x.bfloat16() @ A.detach().bfloat16().t()) @ (B.detach() / 2).bfloat16().t() * 2
    close(found, expected, 2e-2)
    exact = x.double() @ (B.detach().double() @ A.detach().double()).t()
    assert (found.double() - exact).norm() < 0.01 * exact.norm()
