"""Compacter (Karimi Mahabadi et al., 2021; official code rabeehk/compacter) against its equations, in float64."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, random
from structured_toolbox import held, on

from hf_sparse_peft import methods
from hf_sparse_peft.tuners.structured import PHM, Bottleneck, structured_layers
from hf_sparse_peft.tuners.structured.form import Call, Site


def gelu_new(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def matrix(C, s, t):
    """`[in, out]`: the explicit sum."""
    return sum(torch.kron(C[i], s[i] @ t[i]) for i in range(len(C)))


def adapter(y, tensors):
    down = matrix(tensors["phm_rule"], tensors["down_s"], tensors["down_t"])
    up = matrix(tensors["phm_rule"], tensors["up_s"], tensors["up_t"])
    return y + gelu_new(y @ down + tensors["down_bias"]) @ up + tensors["up_bias"]


def test_worked_matrix_of_two_terms():
    tensors = {
        "phm_rule": torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]),
        "x_s": torch.tensor([[[1.0], [2.0]], [[0.0], [1.0]]]),
        "x_t": torch.tensor([[[1.0]], [[3.0]]]),
    }
    expected = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 1.0], [3.0, 2.0]])
    assert torch.equal(PHM(2).dense("x", 2, 4, tensors).t(), expected)
    x = random(3, 4)
    close(PHM(2).product(x, "x", 2, 4, tensors, Call(Site("", 2, 4), torch.float32)), x @ expected)


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"n": 2}, {"n": 1}])
def test_the_output_is_the_adapters_of_explicit_kronecker_sums(options):
    W = random(16, 12)
    _, (layer,) = on("compacter", W, fill=0.5, reduction=2, norms=False, **options)
    x = random(5, 12, seed=3)
    close(layer(x), adapter(x.double() @ W.double().t(), held(layer)))


def test_numbers_of_an_adapter_of_width_24_and_the_shares_that_are_published():
    W = random(768, 8)
    model, layers = on("compacter", W, random(768, 768), norms=False)
    sizes = [sum(p.numel() for p in layer.trained_parameters("default")) for layer in layers]
    assert sizes == [2_376 + 64, 2_376]
    assert model.get_nb_trainable_parameters()[0] == 2 * 2_376 + 64
    assert 24 * 2_376 + 64 + 62 * 768 == 104_704  # Compacter++ of T5-base, norms included: 0.0470 %
    assert 48 * 2_376 + 64 + 62 * 768 == 161_728


def test_it_starts_near_the_identity_and_every_gradient_is_there():
    _, (layer,) = on("compacter", random(32, 8), reduction=4, norms=False)
    tensors = held(layer)
    assert 0.5e-4 < tensors["phm_rule"].std() < 2e-4
    for name, fans in (("down_s", 8 + 1), ("down_t", 1 + 2), ("up_s", 2 + 1), ("up_t", 1 + 8)):
        bound = (2 * 6 / fans) ** 0.5
        assert 0.5 * bound < tensors[name].abs().max() <= bound
    x = random(5, 8)
    y = layer.base_layer(x)
    change = (layer(x) - y).norm() / y.norm()
    assert 0 < change < 1e-6
    (layer(x) * random(5, 32, seed=2)).sum().backward()
    assert all(parameter.grad.any() for parameter in layer.trained_parameters("default"))


def test_the_rule_is_one_tensor_whose_gradient_is_the_sum_over_layers_and_projections():
    weights = [random(8, 8, seed=at) for at in range(3)]
    model, layers = on("compacter", *weights, fill=0.5, reduction=2, norms=False)
    rules = [layer.form_tensors("default")["phm_rule"] for layer in layers]
    assert all(rule is rules[0] for rule in rules)
    assert sum(parameter is rules[0] for parameter in model.parameters()) == 1
    x = random(4, 8, seed=9)
    model(x).square().sum().backward()
    untied = [{name: t.requires_grad_() for name, t in held(layer).items()} for layer in layers]
    both = [(tensors["phm_rule"].clone().detach().requires_grad_(), tensors["phm_rule"]) for tensors in untied]
    y = x.double()
    for W, tensors, (down_rule, up_rule) in zip(weights, untied, both, strict=True):
        y = y @ W.double().t()
        down = matrix(down_rule, tensors["down_s"], tensors["down_t"])
        up = matrix(up_rule, tensors["up_s"], tensors["up_t"])
        y = y + gelu_new(y @ down + tensors["down_bias"]) @ up + tensors["up_bias"]
    y.square().sum().backward()
    close(rules[0].grad, sum(rule.grad for pair in both for rule in pair), 1e-4)


def test_the_rule_is_in_the_file_once_and_is_one_after_load_copy_and_deletion(tmp_path):
    weights = [random(8, 8, seed=at) for at in range(3)]
    model, layers = on("compacter", *weights, fill=0.5, reduction=2, norms=False)
    x = random(4, 8, seed=9)
    answer = model(x)
    model.save_pretrained(tmp_path)
    keys = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert [key for key in keys if "phm_rule" in key] == ["base_model.model.lin.0.structured_phm_rule"]
    loaded = PeftModel.from_pretrained(Linears(*weights), tmp_path, is_trainable=True)
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other(x), answer)
        rules = [layer.form_tensors("default")["phm_rule"] for layer in structured_layers(other)]
        assert all(rule is rules[0] for rule in rules)
        assert rules[0] is not layers[0].form_tensors("default")["phm_rule"]
    model.add_adapter("other", methods.get("compacter", reduction=2, target_modules=["lin.1"]).config)
    model.delete_adapter("other")
    assert torch.equal(model(x), answer)
    with model.disable_adapter():
        assert torch.equal(model(x), Linears(*weights)(x))


def test_rules_of_their_own_are_no_shared_tensor():
    W = random(8, 8)
    form = Bottleneck(4, matrix=PHM(2, rule_std=0.01, shared_rule=False), activation="gelu_new")
    model, layers = on("compacter", W, W, form=form, norms=False)
    assert {"down_rule", "up_rule"} < set(held(layers[1]))
    assert model.peft_config["default"].sizes == {}


def test_sides_that_n_does_not_divide_are_refused_by_the_module():
    with pytest.raises(
        ValueError, match=r"'lin\.0' \(10 outputs, width 5\): PHM\.n=4 does not divide the sides 5 x 10"
    ):
        on("compacter", random(10, 4), reduction=2, norms=False)


def test_norms_and_both_linears_of_a_block_train():
    config = methods.get("compacter").config
    assert {"norm", "LayerNorm"} <= set(config.modules_to_save)
    assert config.target_modules == {"o_proj", "down_proj"}
    assert methods.get("compacter++").config.target_modules == {"down_proj"}
    assert config.form == Bottleneck(None, 32, "gelu_new", PHM(4))
