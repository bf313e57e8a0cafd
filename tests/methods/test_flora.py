"""FLoRA (Si et al., 2024; official code SJTU-DeepVisionLab/FLoRA) against its equations for linears, in float64."""

import pytest
import torch
from peft import PeftModel
from spectral_toolbox import Linears, close, random, weight_gradient
from structured_toolbox import grads, held, on

from hf_sparse_peft import hub


def update_of(tensors, scale):
    """`[out, in]`: the Tucker product `[in, out]`, axes swapped."""
    product = torch.einsum("ab,ia,ob->io", tensors["core"], tensors["basis_in"], tensors["basis_out"])
    return scale * product.t()


@pytest.mark.parametrize(("r_in", "r_out"), [(3, 5), (5, 3), (4, 4)])
def test_the_update_is_the_tucker_product_and_leaves_as_a_lora_of_the_smaller_rank(r_in, r_out, tmp_path):
    W, x = random(16, 12), random(5, 12, seed=3)
    model, (layer,) = on("flora", W, fill=0.5, r_in=r_in, r_out=r_out, scale=0.7)
    close(layer(x), x.double() @ (W.double() + update_of(held(layer), 0.7)).t())
    close(layer.get_delta_weight("default"), update_of(held(layer), 0.7))
    done = hub.export_lora(model, tmp_path)
    assert (done.ranks, done.errors) == ({"lin.0": min(r_in, r_out)}, {"lin.0": 0.0})
    close(PeftModel.from_pretrained(Linears(W), tmp_path)(x), model(x))


def test_it_starts_at_the_base_and_the_core_alone_has_a_gradient_that_the_bases_say():
    W, gradient = random(16, 12), random(16, 12, seed=4)
    model, (layer,) = on("flora", W, r_in=3, r_out=5, scale=0.7)
    x = random(5, 12)
    assert torch.equal(layer(x), layer.base_layer(x))
    weight_gradient(layer, gradient)
    tensors, found = held(layer), grads(model)
    close(found["core"], 0.7 * tensors["basis_in"].t() @ gradient.double().t() @ tensors["basis_out"])
    assert not found["basis_in"].any()
    assert not found["basis_out"].any()


def test_bases_start_at_a_quarter_for_eight_columns_whatever_their_rows():
    for rows in (256, 1024):
        _, (layer,) = on("flora", random(rows, rows), r_in=8, r_out=8)
        for name in ("basis_in", "basis_out"):
            assert abs(held(layer)[name].std() - 0.25) < 0.02


def test_numbers_are_the_core_and_both_bases():
    model, _ = on("flora", random(128, 64), r_in=4, r_out=8)
    assert model.get_nb_trainable_parameters()[0] == 4 * 8 + 64 * 4 + 128 * 8


def test_dropout_is_on_the_input_in_training_alone():
    W, x = random(16, 12), random(200, 12, seed=3)
    _, (layer,) = on("flora", W, fill=0.5, r_in=3, r_out=5, dropout=0.5)
    plain = layer.eval()(x) - layer.base_layer(x)
    layer.train()
    torch.manual_seed(0)
    found = layer(x) - layer.base_layer(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    close(found, dropped.double() @ update_of(held(layer), 1.0).t())
    assert not torch.allclose(found, plain)


def test_a_rank_above_a_side_is_refused_by_the_module():
    with pytest.raises(ValueError, match=r"Tucker\.r_in=8 is above the 4 of 'lin\.0' \(16 x 4\)"):
        on("flora", random(16, 4))
