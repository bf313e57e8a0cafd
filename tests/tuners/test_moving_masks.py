"""Masks that act on the base too: passes by their equations, merging, moves along a curve, resumed runs."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from hf_sparse_peft import MaskedLoraConfig, Prune, Regrow, callbacks_for
from hf_sparse_peft.hub import check_adapter, make_patch, merge_to_dense
from hf_sparse_peft.hub.analysis.merged_weights import merged_weight
from hf_sparse_peft.rules import Gradient, move_units
from hf_sparse_peft.sparsity import pack_bits, unpack_bits
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.masked_lora import DenseUpdate, LowRankUpdate, NoUpdate, ScaleUpdate

TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(12)[None]
UPDATES = [LowRankUpdate(), ScaleUpdate(), DenseUpdate(), NoUpdate()]


def adapted(model, name="default", **options):
    torch.manual_seed(1)
    options = {"r": 3, "init_weights": False, "mask": "all", **TARGETS, **options}
    return get_peft_model(model, MaskedLoraConfig(**options), name)


def masks(model, fraction=0.4, seed=0, adapter="default"):
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model):
        shape = (layer.out_features, layer.in_features)
        layer.keep(adapter, pack_bits(torch.rand(shape, generator=generator) < fraction))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def delta_of(update, W, tensors):
    if isinstance(update, NoUpdate):
        return torch.zeros_like(W)
    if isinstance(update, DenseUpdate):
        return tensors["delta"]
    product = tensors["B"] @ tensors["A"]
    return W * product - W if isinstance(update, ScaleUpdate) else 32 / 3 * product


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.part_type)
def test_outputs_and_gradients_are_the_equations(update):
    linear = torch.nn.Linear(12, 10, dtype=torch.float64)
    W = linear.weight.detach().clone()
    model = adapted(torch.nn.Sequential(linear), target_modules=["0"], task_type=None, update=update)
    layer = adapter_layers(model)[0].double().train()
    masks(model)
    M = layer.kept("default").double()
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, 10, dtype=torch.float64)
    seen = []
    layer.add_gradient_reader("default", seen.append)
    y = layer(x)
    y.backward(dy)
    own = {
        k: t.detach().clone().requires_grad_() for k, t in layer.own_tensors("default").items() if k in update.trained
    }
    z = x.detach().requires_grad_()
    expected = z @ (M * (W + delta_of(update, W, own))).T + linear.bias.detach()
    expected.backward(dy)
    assert torch.allclose(y, expected, atol=1e-12)
    assert torch.allclose(x.grad, z.grad, atol=1e-12)
    for name, tensor in own.items():
        assert tensor.grad.any()
        assert torch.allclose(layer.own_tensors("default")[name].grad, tensor.grad, atol=1e-10)
    assert torch.allclose(seen[0], torch.einsum("abo,abi->oi", dy, x.detach()), atol=1e-10)  # dense, not masked
    layer.merge()
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert not layer.get_base_layer().weight[M == 0].any()
    layer.unmerge()
    assert torch.equal(linear.weight, W)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.part_type)
def test_a_dense_base_is_masked_merged_and_given_back_to_the_bit(update, dtype, tmp_path):
    base = tiny.base("nf4", hidden=64) if dtype == "nf4" else tiny.llama(hidden=64, layers=1)
    base = base.to(torch.bfloat16) if dtype == "bf16" else base
    before, clean = logits(base), copy.deepcopy(base)
    model = adapted(base, update=update, init_weights=True)
    start = logits(model)
    assert torch.allclose(start, before, atol=1e-5 if dtype == "fp32" else 0.1)
    masks(model)
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=0.1)
    model.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    again = PeftModel.from_pretrained(clean, str(tmp_path))
    assert torch.equal(logits(again), trained)
    weights = {layer: layer.dense_base_weight().clone() for layer in adapter_layers(again)}
    again.merge_adapter()
    for layer in weights:
        assert not layer.dense_base_weight()[~layer.kept("default")].any(), layer.module_name
    again.unmerge_adapter()
    assert torch.equal(logits(again), trained)
    assert all(torch.equal(layer.dense_base_weight(), weight) for layer, weight in weights.items())


def test_two_masks_act_on_the_base_together_and_on_their_own_updates():
    model = adapted(tiny.llama(hidden=64, layers=1), name="one")
    model.add_adapter("two", MaskedLoraConfig(r=2, init_weights=False, mask="all", **TARGETS))
    masks(model, adapter="one")
    masks(model, 0.6, 1, "two")
    model.base_model.set_adapter(["one", "two"])
    layer = adapter_layers(model)[0]
    W, x = layer.dense_base_weight().double(), torch.randn(5, layer.in_features)
    expected = W * layer.kept("one") * layer.kept("two")
    for name in ("one", "two"):
        B, A = layer.own_tensors(name)["B"].double(), layer.own_tensors(name)["A"].double()
        expected = expected + layer.kept(name) * (B @ A) * layer.adapter_configs[name].scaling
    assert torch.allclose(layer(x).double(), x.double() @ expected.T, atol=1e-4)
    model.base_model.merge_adapter(["one", "two"])
    assert torch.allclose(layer.dense_base_weight().double(), expected, atol=1e-5)
    gone = ~(layer.kept("one") | layer.kept("two"))
    assert not layer.dense_base_weight()[gone].any()
    model.base_model.unmerge_adapter()
    assert torch.equal(layer.dense_base_weight().double(), W)


@pytest.mark.parametrize("base", ["fp32", "conv1d", "nf4"])
def test_what_two_masks_remove_is_removed_once_in_whatever_leaves(base):
    model = adapted(tiny.base(base), update=LowRankUpdate())
    model.add_adapter("second", MaskedLoraConfig(r=2, init_weights=False, mask="all", **TARGETS))
    masks(model, 0.5), masks(model, 0.5, 1, "second")
    model.base_model.set_adapter(["default", "second"])
    before = logits(model)
    assert torch.allclose(logits(merge_to_dense(model)), before, atol=1e-4)
    layer = adapter_layers(model)[0]
    both = ~layer.kept("default") & ~layer.kept("second")
    assert both.float().mean() > 0.2
    assert not merged_weight(layer, ["default", "second"])[both].any()
    with pytest.raises(ValueError, match="removed once, so that they cannot be weighted"):
        merge_to_dense(model, weights=[0.5, 1.0])
    with pytest.raises(ValueError, match=r"\['default', 'second'\] all remove weights"):
        make_patch(model)
    assert torch.equal(logits(model), before)


def test_units_of_a_mask_are_entries_of_the_weight():
    model = adapted(tiny.llama(hidden=64, layers=1))
    masks(model)
    layer = adapter_layers(model)[0]
    space = next(space for space in layer.unit_spaces("default") if space.kind == "mask")
    kept = layer.kept("default")
    assert space.count == int(kept.sum()) == space.alive().numel()
    assert torch.equal(space.alive().long(), kept.view(-1).nonzero().squeeze(1))
    V = space.current_weight()
    assert torch.equal(space.living_values(), V[kept])
    units = space.alive()[::3]
    result = move_units(space, units, None)
    assert (result.entered, result.left) == (0, int(kept.sum()) - units.numel())
    assert torch.equal(space.alive(), units)
    assert torch.equal(unpack_bits(space.bits, kept.numel()), space.layer.kept("default").view(-1))


def scheduled(out, *rules, steps=6, base=None, **options):
    model = adapted(base or tiny.llama(hidden=64, layers=1), init_weights=True, schedule=list(rules))
    tiny.train(model, out, steps, callbacks=callbacks_for(model), **options)
    return model


def test_prune_keeps_the_largest_merged_weights_along_the_cubic_curve(tmp_path):
    rule = Prune(0.2, start=0.0, end=1.0, every=1, space="mask")
    model = scheduled(tmp_path, rule, steps=10)
    # Zhu & Gupta with s_f = 0.8 over 10 updates
    expected = [0.2168, 0.3904, 0.5256, 0.6272, 0.7, 0.7488, 0.7784, 0.7936, 0.7992, 0.8]
    assert [round(1 - rule.living_fraction(t, 10), 4) for t in range(1, 11)] == expected
    for layer in adapter_layers(model):
        assert int(layer.kept("default").sum()) == round(0.2 * layer.out_features * layer.in_features)


def test_a_run_whose_mask_moves_goes_on_from_its_checkpoint_to_the_bit(tmp_path):
    rules = [Prune(0.5, start=0.0, end=0.9, every=2, space="mask")]
    options = {"steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole = scheduled(tmp_path, *rules, **options)
    again = scheduled(tmp_path, *rules, **options, resume=str(tmp_path / "checkpoint-4"))
    for one, other in zip(adapter_layers(whole), adapter_layers(again), strict=True):
        tensors = other.tensors("default")
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in one.tensors("default").items())


def test_regrow_lets_removed_weights_return_by_the_dense_gradient(tmp_path):
    rule = Regrow(every=2, grow=Gradient(), fraction=0.2, space="mask")
    model = adapted(tiny.llama(hidden=64, layers=1), init_weights=True, mask="given", schedule=[rule])
    masks(model)
    before = {layer: layer.kept("default") for layer in adapter_layers(model)}
    tiny.train(model, tmp_path, 4, callbacks=callbacks_for(model))
    for layer, kept in before.items():
        now = layer.kept("default")
        assert now.sum() == kept.sum()
        assert (now & ~kept).any()
        assert (kept & ~now).any()
