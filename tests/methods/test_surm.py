"""SURM (Sehanobish et al., 2024; official code arijitthegame/structured-matrices-PEFT) against its matrices, in
float64."""

import pytest
import torch
from spectral_toolbox import close, random, weight_gradient
from structured_toolbox import grads, held, on

from hf_sparse_peft import hub, methods
from hf_sparse_peft.tuners.structured import Circulant
from hf_sparse_peft.tuners.structured.displacement import circular, skew_circular, symmetric_toeplitz

STRUCTURES = ("circulant", "toeplitz", "kronecker", "displacement")


def circulant(c):
    d = len(c)
    return torch.stack([torch.stack([c[(i - j) % d] for j in range(d)]) for i in range(d)])


def skew(c):
    d = len(c)
    return torch.stack([torch.stack([c[i - j] if i >= j else -c[d + i - j] for j in range(d)]) for i in range(d)])


def toeplitz(c):
    d = len(c)
    return torch.stack([torch.stack([c[abs(i - j)] for j in range(d)]) for i in range(d)])


def dense(structure, tensors, scale=1.0):
    if structure == "circulant":
        return scale * circulant(tensors["circulant_b"] * tensors["circulant_a"])
    if structure == "toeplitz":
        return scale * toeplitz(tensors["toeplitz_b"]) @ toeplitz(tensors["toeplitz_a"])
    if structure == "kronecker":
        return scale * torch.kron(tensors["first"], tensors["second"])
    pairs = zip(tensors["circulants"], tensors["skew_circulants"], strict=True)
    return scale * sum(circulant(c) @ skew(s) for c, s in pairs)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_transforms_are_the_matrices_products_first_column_and_odd_sides_too(d):
    c, x = random(d).double(), random(3, d, seed=2).double()
    close(circular(c, x), x @ circulant(c).t(), 1e-12)
    close(skew_circular(c, x), x @ skew(c).t(), 1e-12)
    close(symmetric_toeplitz(c, x), x @ toeplitz(c).t(), 1e-12)


def test_worked_circulant_is_of_the_product_of_vectors_and_not_a_product_of_circulants():
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 0.0, 2.0, 0.0])
    one = torch.eye(4)[:1]
    close(Circulant().transform(one, {"circulant_a": a, "circulant_b": b})[0], torch.tensor([1.0, 0.0, 6.0, 0.0]))
    close((circulant(b) @ circulant(a))[:, 0], torch.tensor([7.0, 10.0, 5.0, 8.0]))


@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (8, 6), (6, 8)], ids=lambda one: f"{one[0]}x{one[1]}")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_update_is_the_matrix_or_its_part_and_merges(structure, shape):
    if structure == "kronecker" and 7 in shape:
        pytest.skip("7 is prime")
    W, x = random(*shape), random(5, shape[1], seed=3)
    model, (layer,) = on("surm", W, fill=0.5, structure=structure, r=2, scale=0.7)
    update = dense(structure, held(layer), 0.7)[: shape[0], : shape[1]]
    close(layer.get_delta_weight("default"), update)
    close(layer(x), x.double() @ (W.double() + update).t())
    close(hub.merge_to_dense(model)(x), model(x))
    gradient = random(*shape, seed=4)
    weight_gradient(layer, gradient)
    wide = {name: t.clone().requires_grad_() for name, t in held(layer).items()}
    (dense(structure, wide, 0.7)[: shape[0], : shape[1]] * gradient.double()).sum().backward()
    for name, found in grads(model).items():
        close(found, wide[name].grad)


@pytest.mark.parametrize(("structure", "numbers"), [("circulant", 64), ("toeplitz", 64), ("kronecker", 64),
                                                    ("displacement", 2 * 2 * 32)])  # fmt: skip
def test_numbers_and_a_start_at_the_base_with_a_gradient_in_one_factor(structure, numbers):
    model, (layer,) = on("surm", random(32, 32), structure=structure, r=2)
    assert model.get_nb_trainable_parameters()[0] == numbers
    x = random(5, 32)
    assert torch.equal(layer(x), layer.base_layer(x))
    weight_gradient(layer, random(32, 32, seed=4))
    assert sorted(bool(grad.any()) for grad in grads(model).values()) == [False, True]


def test_starts_are_the_published_ones():
    for structure, name, std in (("circulant", "circulant_a", 1.0), ("toeplitz", "toeplitz_a", 0.02),
                                 ("displacement", "skew_circulants", 0.02)):  # fmt: skip
        _, (layer,) = on("surm", random(1024, 4), structure=structure)
        assert abs(held(layer)[name].std() / std - 1) < 0.1
    _, (layer,) = on("surm", random(64, 64), structure="kronecker", r=8)
    assert 0.8 * 8**-0.5 < held(layer)["second"].abs().max() <= 8**-0.5


def test_ranks_are_unrestricted_and_shapes_are_what_they_say():
    _, (layer,) = on("surm", torch.zeros(8, 8), fill=1.0, structure="toeplitz")
    update = layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(update) == 8
    assert not torch.allclose(update[1:, 1:], update[:-1, :-1], atol=1e-3)
    _, (layer,) = on("surm", torch.zeros(8, 8), fill=1.0, structure="circulant")
    update = layer.get_delta_weight("default")
    close(update.roll((1, 1), (0, 1)), update)
    assert torch.linalg.matrix_rank(update) == 8


def test_a_part_of_full_rank_leaves_as_a_lora_with_its_error_and_kronecker_exactly(tmp_path):
    model, _ = on("surm", random(16, 16), fill=0.5, structure="circulant")
    with pytest.warns(UserWarning, match="relative error"):
        assert 0 < hub.export_lora(model, tmp_path / "a", rank=4).errors["lin.0"] < 1
    model, _ = on("surm", random(64, 64), fill=0.5, structure="kronecker", r=2)
    done = hub.export_lora(model, tmp_path / "b")
    assert (done.ranks, done.errors) == ({"lin.0": 4}, {"lin.0": 0.0})


def test_an_unknown_structure_is_refused():
    with pytest.raises(ValueError, match="structure='hankel' is unknown; choose one of"):
        methods.get("surm", structure="hankel")
