"""Bases whose quantisation peft does not know: FP8 weights with scales, and packed weights that only run."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import FP8Linear

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig, SpectralLoraConfig
from hf_sparse_peft.hub import merge_to_dense
from hf_sparse_peft.tuners import adapter_layers

IDS = torch.randint(1, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
FP8 = torch.float8_e4m3fn
NAMES = ("q_proj", "down_proj")


class RowScaled(nn.Linear):
    """As transformers' layers for compressed-tensors and fbgemm: a scale an output, and a kernel without gradient."""

    def __init__(self, dense, shape):
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        scale = dense.weight.detach().abs().amax(1) / 448
        self.weight = nn.Parameter((dense.weight.detach() / scale[:, None]).to(FP8), requires_grad=False)
        self.weight_scale = nn.Parameter(scale.view(shape), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            return F.linear(x, (self.weight.float() * self.weight_scale.view(-1, 1)).to(x.dtype))


def fine_grained(dense, block=(16, 8)):
    """transformers' own layer; its kernel needs a GPU and is stood in for (`kernel_on_cpu`)."""
    layer = FP8Linear(dense.in_features, dense.out_features, block_size=block)
    weight = dense.weight.detach()
    rows, cols = weight.shape
    parts = weight.view(rows // block[0], block[0], cols // block[1], block[1])
    scale = parts.abs().amax((1, 3)) / 448
    layer.weight = nn.Parameter((parts / scale[:, None, :, None]).view(rows, cols).to(FP8), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    return layer


class Packed(nn.Module):
    """As transformers' NVFP4 layer: packed codes that only its own kernel reads."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight = nn.Buffer(torch.zeros(dense.out_features, dense.in_features // 2, dtype=torch.uint8))
        self.hidden = [dense.weight.detach().clone()]

    def forward(self, x):
        return F.linear(x, self.hidden[0].to(x.dtype))


KINDS = {
    "fp8 blocks": fine_grained,
    "fp8 rows": lambda dense: RowScaled(dense, (1, -1)),
    "fp8 rows, upright": lambda dense: RowScaled(dense, (-1, 1)),
    "packed": Packed,
}


@pytest.fixture(autouse=True)
def kernel_on_cpu(monkeypatch):
    def product(x, weight, scale, block_size, *_):
        dense = finegrained_fp8._dequantize_fp8_weight(weight, scale, block_size, torch.float32)
        return F.linear(x, dense.to(x.dtype))

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)


def quantised(kind):
    """A Llama with such layers, and the same one with the weights that they stand for."""
    model, dense = tiny.llama(), tiny.llama()
    for name, module in list(model.named_modules()):
        if name.endswith(NAMES):
            parent, _, child = name.rpartition(".")
            new = KINDS[kind](module)
            setattr(model.get_submodule(parent), child, new)
            if kind != "packed":
                with torch.no_grad():  # the product with one-hot inputs is the weight
                    dense.get_submodule(name).weight.copy_(new(torch.eye(module.in_features)).t())
    return model.requires_grad_(False), dense


def adapted(base, config=None, seed=1):
    model = get_peft_model(base, config or SparseLoraConfig(r=2, density=0.1, target_modules=list(NAMES)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


CONFIGS = {
    "entries+rank": SparseLoraConfig(r=2, density=0.1, target_modules=list(NAMES)),
    "rows": SparseLoraConfig(r=0, density=0.1, granularity="row", target_modules=list(NAMES)),
    "blocks": SparseLoraConfig(r=0, density=0.1, granularity="block", block_size=8, target_modules=list(NAMES)),
    "kernel": KernelLoraConfig(r=4, target_modules=list(NAMES)),
}


@tiny.crossed(kind=list(KINDS), form=list(CONFIGS))
def test_outputs_and_gradients_are_those_over_the_weights_that_the_codes_stand_for(kind, form):
    base, dense = quantised(kind)
    model, reference = adapted(base, CONFIGS[form]), adapted(dense, CONFIGS[form])
    out, expected = (one(IDS, labels=IDS) for one in (model, reference))
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
    out.loss.backward()
    expected.loss.backward()
    others = dict(reference.named_parameters())
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    assert trained
    for key, parameter in trained:
        torch.testing.assert_close(parameter.grad, others[key].grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["fp8 blocks", "fp8 rows"])
def test_fp8_weights_are_read_with_their_scales(kind):
    base, dense = quantised(kind)
    chosen = [
        get_peft_model(one, SparseLoraConfig(r=0, density=0.1, criterion="magnitude", target_modules=list(NAMES)))
        for one in (base, dense)
    ]
    for ours, other in zip(*map(adapter_layers, chosen), strict=True):
        torch.testing.assert_close(ours.dense_base_weight(), other.dense_base_weight())
        assert torch.isin(ours.units("default"), other.units("default")).float().mean() > 0.98
    model = adapted(quantised(kind)[0]).eval()
    plain = merge_to_dense(model)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-3)
    assert all(type(plain.get_submodule(one.module_name)) is nn.Linear for one in adapter_layers(model))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_refused_by_name_and_leaves_the_base_as_it_was(kind):
    model = adapted(quantised(kind)[0]).eval()
    before = model(IDS).logits
    with pytest.raises(TypeError, match=r"not (supported|available)"):
        model.merge_adapter()
    assert torch.equal(model(IDS).logits, before)
    assert not any(layer.merged for layer in adapter_layers(model))


def test_a_packed_weight_that_cannot_be_read_is_refused_where_it_would_be():
    for config in (
        SparseLoraConfig(r=0, density=0.1, criterion="magnitude", target_modules=list(NAMES)),
        SpectralLoraConfig(r=4, target_modules=list(NAMES)),
    ):
        base = quantised("packed")[0]
        before = [name for name, _ in base.named_modules()]
        with pytest.raises((TypeError, ValueError), match=r"Packed|Dequantization is not supported"):
            get_peft_model(base, config)
        assert [name for name, _ in base.named_modules()] == before
    with pytest.raises(ValueError, match="cannot be read back"):
        merge_to_dense(adapted(quantised("packed")[0]))


@pytest.mark.parametrize("kind", ["fp8 blocks", "packed"])
def test_an_adapter_trains_and_is_saved_over_them(kind, tmp_path):
    def codes(model):
        held = (getattr(module, "weight", None) for module in model.modules())
        return [one.detach().view(torch.uint8).clone() for one in held if one is not None and one.element_size() == 1]

    model = adapted(quantised(kind)[0])
    before, start = codes(model), {key: p.clone() for key, p in model.named_parameters() if p.requires_grad}
    assert before
    tiny.train(model, tmp_path / "run", 3)
    assert all(not torch.equal(value, dict(model.named_parameters())[key]) for key, value in start.items())
    assert all(torch.equal(one, other) for one, other in zip(before, codes(model), strict=True))
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(quantised(kind)[0], tmp_path / "saved").eval()
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
