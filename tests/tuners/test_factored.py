"""Factored bases: forms in the place of weights, through training, files, merging and export."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_sparse_peft import FactoredConfig, calibrate
from hf_sparse_peft.hub import merge_to_dense
from hf_sparse_peft.tuners.factored import (
    FixedRank,
    LowRank,
    ParameterRatio,
    SingularValueThreshold,
    factored_layers,
)

TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(12)[None]


def factored(base="fp32", **options):
    return get_peft_model(tiny.base(base), FactoredConfig(**{**TARGETS, **options}))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def linear(rows, cols, bias=True, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(cols, rows, bias=bias, dtype=torch.float64))


def test_low_rank_is_the_truncated_svd_and_its_gradients_are_the_equations():
    base = linear(10, 12)
    W, b = base[0].weight.detach().clone(), base[0].bias.detach().clone()
    model = get_peft_model(base, FactoredConfig(target_modules=["0"], rank=FixedRank(3), keep_base=False))
    layer = factored_layers(model)[0].double()
    A, B = layer.factored_A["default"], layer.factored_B["default"]
    U, S, Vh = torch.linalg.svd(W)
    assert torch.allclose(B @ A, U[:, :3] * S[:3] @ Vh[:3], atol=1e-6)
    assert torch.allclose(A.square().sum(1), S[:3], atol=1e-6)
    assert torch.allclose(B.square().sum(0), S[:3], atol=1e-6)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, 10, dtype=torch.float64)
    layer(x).backward(dy)
    dense = dy.flatten(0, 1).T @ x.detach().flatten(0, 1)
    assert torch.allclose(layer(x), x @ (B @ A).T + b)
    assert torch.allclose(A.grad, B.detach().T @ dense)
    assert torch.allclose(B.grad, dense @ A.detach().T)
    assert torch.allclose(x.grad, dy @ (B @ A).detach())


def test_bf16_products_have_the_gradients_of_fp32_masters():
    model = factored("bf16", rank=FixedRank(4))
    layer = factored_layers(model)[0]
    x = torch.randn(2, 3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    A, B = layer.factored_A["default"], layer.factored_B["default"]
    assert A.dtype == A.grad.dtype == torch.float32
    assert x.grad.dtype == torch.bfloat16
    dense = torch.ones(6, layer.out_features).T @ x.detach().float().flatten(0, 1)
    assert torch.allclose(A.grad, B.detach().T @ dense, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4", "conv1d"])
def test_a_released_base_trains_saves_reloads_merges_and_refuses_what_needs_its_weight(base, tmp_path):
    model = factored(base)
    assert all(layer.released and layer.get_base_layer().weight.numel() == 0 for layer in factored_layers(model))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".factored_" in name}
    before = logits(model)
    model.save_pretrained(tmp_path)
    with model.disable_adapter(), pytest.raises(ValueError, match="keep_base=True"):
        logits(model)
    with pytest.raises(ValueError, match="keep_base=True"):
        model.unload()
    with pytest.raises(ValueError, match="keep_base=True"):
        model.delete_adapter("default")
    assert torch.equal(logits(model), before)
    assert list(model.peft_config) == ["default"]
    assert torch.allclose(logits(merge_to_dense(model)), before, atol=5e-2 if base == "bf16" else 1e-4)
    with pytest.raises(ValueError, match="keep_base=True"):
        merge_to_dense(model, weights=[0.5])
    again = PeftModel.from_pretrained(tiny.base(base), tmp_path)
    assert torch.equal(logits(again), before)
    assert all(layer.released for layer in factored_layers(again))
    again.merge_adapter()
    assert torch.allclose(logits(again), before, atol=5e-2 if base == "bf16" else 1e-4)
    again.unmerge_adapter()
    assert torch.equal(logits(again), before)
    dense = again.merge_and_unload()
    assert not [name for name, _ in dense.named_modules() if "factored" in name]
    assert torch.allclose(logits(dense), before, atol=5e-2 if base == "bf16" else 1e-4)


def test_the_file_is_smaller_by_the_ratio():
    layers = factored_layers(factored(rank=ParameterRatio(0.5)))
    stored = sum(p.numel() for layer in layers for p in layer.trained_parameters("default"))
    dense = sum(layer.out_features * layer.in_features for layer in layers)
    assert 0.4 * dense < stored <= 0.5 * dense


def test_two_adapters_over_a_kept_base_add_up_and_it_comes_back():
    base = tiny.base("fp32")
    own = logits(base)
    model = get_peft_model(base, FactoredConfig(keep_base=True, rank=FixedRank(8), **TARGETS))
    one = factored_layers(model)[0].factored_weight("default")
    model.add_adapter("other", FactoredConfig(keep_base=True, rank=FixedRank(4), **TARGETS))
    layer = factored_layers(model)[0]
    W, two = layer.dense_base_weight(), layer.factored_weight("other")
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(4, layer.in_features)
    assert torch.allclose(layer(x), x @ (one + two - W).T, atol=1e-5)
    summed = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), summed, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model.unload()), own)


def test_what_saves_nothing_stays_dense_and_is_named():
    with pytest.warns(UserWarning, match="k_proj.*would take 528 numbers at rank 11"):
        model = factored(rank=FixedRank(11))  # k and v: 16 x 32 = 512 < 11 * 48; q: 11 * 64 = 704 < 1024
    assert [name.rpartition(".")[2] for name in model.peft_config["default"].left_dense] == ["k_proj", "v_proj"] * 2
    assert not any("k_proj" in layer.module_name for layer in factored_layers(model))
    with pytest.raises(ValueError, match="saves nothing"):
        factored(rank=FixedRank(32))


def test_export_gives_two_linear_layers_that_peft_adapts():
    model = factored("fp32", rank=FixedRank(4))
    before = logits(model)
    plain = model.base_model.export_modules()
    q = plain.model.layers[0].self_attn.q_proj
    assert [tuple(part.weight.shape) for part in q] == [(4, 32), (32, 4)]
    assert torch.allclose(logits(plain), before, atol=1e-5)
    on_top = get_peft_model(plain, LoraConfig(target_modules=["down", "up"], task_type="CAUSAL_LM"))
    assert torch.allclose(logits(on_top), before, atol=1e-5)


def test_input_weighting_minimises_the_output_error_on_data():
    data = [{"input_ids": torch.randint(0, tiny.VOCAB, (8, 12), generator=torch.Generator().manual_seed(5))}]
    model = factored(form=LowRank(weighting="full", examples=8), rank=FixedRank(4), target_modules=["gate_proj"])
    W = {layer.module_name: layer.dense_base_weight().double().clone() for layer in factored_layers(model)}
    with pytest.raises(ValueError, match="starts from data"):
        model.train()(input_ids=IDS)
    seen, layer = [], factored_layers(model)[0]
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().double()))
    logits_before = model.eval()(**data[0]).logits
    hook.remove()
    assert torch.isfinite(logits_before).all()
    calibrate(model, data)
    assert layer.released
    x = seen[0].flatten(0, 1)
    _, S, _ = torch.linalg.svd(x @ W[layer.module_name].T)
    error = (x @ (W[layer.module_name] - layer.factored_weight("default").double()).T).square().sum()
    _, _, Vh = torch.linalg.svd(W[layer.module_name])
    unweighted = (x @ (W[layer.module_name] @ (torch.eye(32).double() - Vh[:4].T @ Vh[:4])).T).square().sum()
    assert torch.allclose(error, S[4:].square().sum(), rtol=1e-3)
    assert error < 0.9 * unweighted


def test_welores_threshold_cuts_worked_spectra_unevenly():
    rule = SingularValueThreshold(threshold=0.3)
    spectra = {"a": torch.tensor([4.0, 2, 1, 0]).double(), "b": torch.tensor([3, 2.9, 2.8, 0]).double()}
    assert rule.kept(spectra) == {"a": 2, "b": 3}
    assert SingularValueThreshold(0.375).kept(spectra) == {"a": 2, "b": 3}
    assert SingularValueThreshold(threshold=0.0).kept(spectra) == {"a": 4, "b": 4}
