"""DiffuseKronA (Marjit et al., 2025; official code IBM/DiffuseKronA) against its equations, in float64."""

import pytest
import torch
from peft import PeftModel
from spectral_toolbox import Linears, close, random, weight_gradient
from structured_toolbox import grads, held, on

from hf_sparse_peft import hub


def released(A, B, x):
    """The released layer's sum, entry by entry."""
    (a1, a2), (p, j) = A.shape, B.shape
    X = x.reshape(*x.shape[:-1], a2, j)
    return torch.einsum("pj,qi,...ij->...pq", B, A, X).reshape(*x.shape[:-1], p * a1)


@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12)])
@pytest.mark.parametrize("layout", ["kron", "released"])
def test_the_output_is_that_of_the_product_in_the_papers_or_the_released_order(layout, shape):
    W = random(20, 12)
    model, (layer,) = on("diffusekrona", W, fill=0.5, rows=5, cols=3, layout=layout)
    A, B = held(layer)["first"], held(layer)["second"]
    assert (tuple(A.shape), tuple(B.shape)) == ((5, 3), (4, 4))
    x = random(*shape, seed=3).double()
    product = x @ torch.kron(A, B).t() if layout == "kron" else released(A, B, x)
    close(layer(x.float()), x @ W.double().t() + product)
    swapped = x @ torch.kron(B, A).t()
    assert (product - swapped).norm() > 0.1 * product.norm()
    close(hub.merge_to_dense(model)(x.float()), model(x.float()))


def test_the_released_layout_is_a_shuffle_of_the_outputs():
    W = torch.zeros(20, 12)
    outputs = []
    for layout in ("kron", "released"):
        _, (layer,) = on("diffusekrona", W, fill=0.5, rows=5, cols=3, layout=layout)
        outputs.append(layer.get_delta_weight("default"))
    shuffled = outputs[0].view(5, 4, 12).transpose(0, 1).reshape(20, 12)
    assert torch.equal(outputs[1], shuffled)
    assert (outputs[0] - outputs[1]).norm() > 1


def test_rank_is_the_product_of_ranks_and_the_lora_has_it_exactly(tmp_path):
    W, x = random(8, 15), random(5, 15, seed=3)
    model, (layer,) = on("diffusekrona", W, fill=0.5, rows=2, cols=3)  # 2 x 3 and 4 x 5
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == 8
    assert layer.pieces("default")[0].exact_rank is None  # a LoRA of rank 8 is no smaller than the weight
    W = random(40, 40)
    model, (layer,) = on("diffusekrona", W, fill=0.5, rows=20, cols=2)  # rank 2 of a 20 x 2, 2 of a 2 x 20
    x = random(5, 40, seed=3)
    done = hub.export_lora(model, tmp_path)
    assert (done.ranks, done.errors) == ({"lin.0": 4}, {"lin.0": 0.0})
    close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x))


def test_it_starts_at_the_base_and_b_alone_has_a_gradient_that_a_says():
    W, gradient = random(20, 12), random(20, 12, seed=4)
    model, (layer,) = on("diffusekrona", W, rows=5, cols=3)
    x = random(5, 12)
    assert torch.equal(layer(x), layer.base_layer(x))
    weight_gradient(layer, gradient)
    A, found = held(layer)["first"], grads(model)
    blocks = gradient.double().reshape(5, 4, 3, 4)  # [q, p, i, j]
    close(found["second"], torch.einsum("qi,qpij->pj", A, blocks))
    assert not found["first"].any()


def test_numbers_and_start_of_sdxl():
    model, (layer,) = on("diffusekrona", random(1280, 1280))
    assert model.get_nb_trainable_parameters()[0] == 3_712  # LoRA of rank 4: 10,240
    assert abs(held(layer)["first"].std() * 64 - 1) < 0.15
