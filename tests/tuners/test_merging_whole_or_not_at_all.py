"""Merging is the one writer: right for weights that are shared, whole or not at all, undone to the last bit."""

import signal
import threading

import pytest
import tiny
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig
from hf_sparse_peft.hub import merge_to_dense
from hf_sparse_peft.methods import one_shot_pruned
from hf_sparse_peft.tuners import adapter_layers

IDS = torch.arange(1, 13).view(2, 6)
CONFIGS = {
    "sparse": lambda **o: SparseLoraConfig(r=0, density=0.3, init_weights=False, **o),
    "hybrid-row": lambda **o: SparseLoraConfig(r=2, density=0.3, granularity="row", init_weights=False, **o),
    "kernel": lambda **o: KernelLoraConfig(r=4, sparsity=0.5, init_weights=False, **o),
}


class Pair(nn.Module):
    """Two linear layers; `share` says what they have in common."""

    def __init__(self, share):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        if share == "parameter":
            self.b.weight = self.a.weight
        elif share == "memory":
            self.b.weight = nn.Parameter(self.a.weight.detach())
        elif share == "module":
            self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def bits(model):
    """All tensors that belong to the base, by name without the adapter layers' part."""
    found = {n.replace("base_layer.", ""): t for n, t in model.state_dict(keep_vars=True).items()}
    return {n: t.detach().clone() for n, t in found.items() if "sparse_lora_" not in n and "kernel_lora_" not in n}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def weights_of(model):
    return [layer.get_base_layer().weight for layer in adapter_layers(model)]


@pytest.mark.parametrize("targets", [["a", "b"], ["b"]], ids=["both adapted", "one adapted"])
@pytest.mark.parametrize("share", ["parameter", "memory"])
@pytest.mark.parametrize("config", list(CONFIGS))
def test_layers_that_share_a_weight_merge_each_its_own_update_and_share_again_afterwards(config, share, targets):
    model = get_peft_model(Pair(share), CONFIGS[config](target_modules=targets))
    x = torch.randn(3, 16)
    before, expected, weights = bits(model), model(x), weights_of(model)
    with model.disable_adapter():
        plain = model(x)
    assert (expected - plain).abs().max() > 1e-2
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert same(bits(model), before)
    assert all(now is then for now, then in zip(weights_of(model), weights, strict=True))
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-4, atol=1e-5)


def test_a_module_under_two_names_of_which_one_is_adapted_is_refused_by_both_names():
    model = get_peft_model(Pair("module"), CONFIGS["sparse"](target_modules=["a"]))
    before = bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'a' and 'b' are one module.*copy\.deepcopy"):
            merge()
    assert same(bits(model), before)
    assert len(adapter_layers(model)) == 1


@pytest.mark.parametrize("config", ["sparse", "kernel"])
def test_a_head_on_a_tied_base_leaves_the_embedding_alone(config, tmp_path):
    base = tiny.llama(layers=1, tie_word_embeddings=True).eval()
    model = get_peft_model(base, CONFIGS[config](target_modules=["lm_head"])).eval()
    embedding, expected = model.get_input_embeddings().weight, model(input_ids=IDS).logits
    before, version = embedding.detach().clone(), embedding._version
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(embedding, before)
    assert embedding._version == version
    model.unmerge_adapter()
    assert adapter_layers(model)[0].get_base_layer().weight is embedding, "tied again"
    plain = model.merge_and_unload()
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_unloading_without_a_merge_keeps_a_tied_head_tied():
    model = get_peft_model(
        tiny.llama(layers=1, tie_word_embeddings=True), CONFIGS["sparse"](target_modules=["lm_head"])
    )
    plain = model.unload()
    assert plain.config.tie_word_embeddings
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


def adapted(kind, config="sparse"):
    targets = ["c_attn", "c_proj"] if kind == "conv1d" else ["q_proj", "down_proj"]
    return get_peft_model(tiny.base(kind, layers=2), CONFIGS[config](target_modules=targets)).eval()


def interrupt(layer, where, monkeypatch):
    original = getattr(type(layer), where)

    def stops_here(self, *args, **kwargs):
        if self is layer and where != "_install":
            raise KeyboardInterrupt
        original(self, *args, **kwargs)
        if self is layer:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(layer), where, stops_here)


@pytest.mark.parametrize("where", ["_add_delta_", "_install"], ids=["while it adds", "just after it wrote"])
@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8", "conv1d"])
def test_ctrl_c_in_the_middle_of_merging_leaves_nothing_merged(kind, config, where, monkeypatch):
    model = adapted(kind, config)
    before, expected, layers = bits(model), model(input_ids=IDS).logits, adapter_layers(model)
    interrupt(layers[2], where, monkeypatch)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(KeyboardInterrupt):
            merge()
        assert adapter_layers(model) == layers
        assert not any(layer.merged for layer in layers)
        assert same(bits(model), before)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    monkeypatch.undo()
    model.merge_adapter()  # nothing is in the way of another try
    model.unmerge_adapter()
    assert same(bits(model), before)


@pytest.mark.parametrize("kind", ["fp32", "nf4", "int8"])
def test_ctrl_c_in_the_middle_of_unmerging_leaves_everything_merged(kind, monkeypatch):
    model = adapted(kind)
    before, layers = bits(model), adapter_layers(model)
    model.merge_adapter()
    merged = bits(model)
    with monkeypatch.context() as patch:
        original = type(layers[0]).unmerge
        patch.setattr(type(layers[0]), "unmerge", lambda self: original(self) if self is not layers[2] else press())
        with pytest.raises(KeyboardInterrupt):
            model.unmerge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in layers)
    assert same(bits(model), merged)
    model.unmerge_adapter()
    assert same(bits(model), before)


def press():
    raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_ctrl_c_while_a_second_adapter_is_merged_keeps_the_first_merged(kind, monkeypatch):
    model = adapted(kind)
    model.add_adapter("second", CONFIGS["hybrid-row"](target_modules=["q_proj"]))
    before, layers = bits(model), adapter_layers(model)
    model.merge_adapter(["default"])
    merged = bits(model)
    with monkeypatch.context() as patch:
        interrupt(layers[2], "_install", patch)
        with pytest.raises(KeyboardInterrupt):
            model.merge_adapter(["second"])
    assert {tuple(layer.merged_adapters) for layer in layers} == {("default",)}
    assert same(bits(model), merged)
    model.unmerge_adapter()
    assert same(bits(model), before)


def test_a_key_pressed_while_a_merge_is_undone_waits_until_it_is(monkeypatch):
    model = adapted("fp32")
    before, layers = bits(model), adapter_layers(model)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    original = type(layers[0]).restore_merge_state

    def pressed_again(self, state):
        if self is layers[1]:
            signal.raise_signal(signal.SIGINT)
        original(self, state)

    monkeypatch.setattr(type(layers[0]), "restore_merge_state", pressed_again)
    interrupt(layers[2], "_add_delta_", monkeypatch)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.merge_adapter()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert same(bits(model), before)
    assert not any(layer.merged for layer in layers)


def test_merging_works_in_a_thread_that_gets_no_signals():
    model, failed = adapted("fp32"), []
    before = bits(model)

    def merge():
        try:
            model.merge_adapter()
            model.unmerge_adapter()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=merge)
    thread.start()
    thread.join()
    assert not failed
    assert same(bits(model), before)


def test_the_merged_weight_keeps_what_the_original_was_marked_with():
    model = adapted("bf16")
    base = adapter_layers(model)[0].get_base_layer()
    base.weight.mark = "kept"
    model.merge_adapter()
    assert base.weight.mark == "kept"
    assert base.weight.dtype == torch.bfloat16
    assert not base.weight.requires_grad


def test_a_weight_that_is_computed_at_each_forward_is_refused_with_the_mend():
    base = Pair(None)
    model = get_peft_model(base, CONFIGS["sparse"](target_modules=["a", "b"]))
    layer = adapter_layers(model)[1].get_base_layer()
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    before = bits(model)
    with pytest.raises(ValueError, match=r"'b' is computed at each forward.*remove_parametrizations"):
        model.merge_adapter()
    assert same(bits(model), before)
    assert not any(layer.merged for layer in adapter_layers(model))


@pytest.mark.parametrize("share", ["parameter", "module"])
def test_a_dense_copy_keeps_shared_layers_apart(share):
    model = get_peft_model(Pair(share), CONFIGS["sparse"](target_modules=["a"]))
    x = torch.randn(3, 16)
    expected, before = model(x), bits(model)
    torch.testing.assert_close(merge_to_dense(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert same(bits(model), before)


def test_pruning_in_one_shot_writes_into_no_weight_and_leaves_sharing_layers_and_merges_alone():
    model = tiny.llama(layers=1)
    weights = {n: (p, p._version, p.detach().clone()) for n, p in model.named_parameters()}
    outside = model.model.layers[0].mlp.up_proj.weight
    model.aside = nn.Linear(1, 1, bias=False)
    model.aside.weight = outside
    with one_shot_pruned(model, 0.5):
        assert (model.model.layers[0].mlp.up_proj.weight == 0).any()
        assert all(p._version == version and torch.equal(p, kept) for p, version, kept in weights.values())
        assert model.aside.weight is outside
    assert all(model.get_parameter(n) is p for n, (p, _, _) in weights.items())
