"""What masks cost, in bytes that autograd keeps, and what they leave: zeros that are counted, not assumed."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_sparse_peft import MaskedLoraConfig, SparseLoraConfig, set_masks, sparsity_report
from hf_sparse_peft.pruning import prune_model
from hf_sparse_peft.sparsity import pack_bits
from hf_sparse_peft.tuners import adapter_layers

TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(12)[None]


def pruned(**options):
    model = tiny.llama(hidden=64, layers=2)
    return model, prune_model(model, method="magnitude", sparsity=0.5, show_progress=False, **options)


def adapted(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, MaskedLoraConfig(**{"r": 4, "init_weights": False, **TARGETS, **options}))


def saved_bytes(model) -> int:
    """Bytes that autograd keeps for the backward pass and that are no parameter or buffer of the model."""
    seen, own = {}, {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(input_ids=IDS, labels=IDS)
    return sum(size for place, size in seen.items() if place not in own)


@pytest.mark.parametrize("masks_base", [False, True])
def test_saved_bytes_are_a_loras_and_a_bit_a_weight(masks_base):
    base, _ = pruned()
    lora = saved_bytes(get_peft_model(copy.deepcopy(base), LoraConfig(r=4, **TARGETS)))
    model = adapted(base, masks_base=masks_base)
    masked, bits = saved_bytes(model), sum(b.nbytes for name, b in model.named_buffers() if "_mask" in name)
    weights = sum(layer.out_features * layer.in_features for layer in adapter_layers(model))
    print(f"LoRA saves {lora} bytes, masked LoRA {masked}, and {bits} bytes of mask for {weights} weights")
    assert bits == weights / 8
    assert masked <= lora


def test_zeros_are_counted_before_and_as_merged_and_the_model_is_left_as_it_was():
    base, report = pruned()
    plain = sparsity_report(base)
    counts = {one.name: one.zeros for one in plain.layers}
    assert all(counts[name] == zeros for name, zeros in report.zeros.items())
    assert set(counts) - set(report.zeros) == {"lm_head"}
    lora = get_peft_model(copy.deepcopy(base), SparseLoraConfig(r=4, density=0, init_weights=False, **TARGETS))
    filled = lora.sparsity_report()
    assert filled.total.zeros == plain.total.zeros
    assert filled.total.filled == sum(report.zeros.values())  # a LoRA fills every zero
    assert filled.merged_sparsity < 0.01
    model = adapted(base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    kept = model.sparsity_report()
    assert kept.total.filled == kept.total.removed == kept.total.rounded == 0
    assert kept.merged_sparsity == kept.sparsity == plain.sparsity
    model.merge_adapter()
    assert model.sparsity_report() == kept
    assert adapter_layers(model)[0].merged
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "model.layers.0.mlp.up_proj" in str(kept.table())


def test_what_a_mask_removes_is_counted_apart_from_what_a_quantised_grid_rounds_away():
    model = adapted(tiny.base("nf4", hidden=64), mask="all", masks_base=True)
    for layer in adapter_layers(model):
        numel = layer.out_features * layer.in_features
        layer.keep("default", pack_bits(torch.arange(numel) % 4 != 0))
    before = [layer.get_base_layer().weight.data.clone() for layer in adapter_layers(model)]
    report = model.sparsity_report()
    for layer, one, packed in zip(adapter_layers(model), report.layers, before, strict=False):
        assert torch.equal(layer.get_base_layer().weight.data, packed)
        gone = ~layer.kept("default")
        was = layer.dense_base_weight() == 0
        layer.merge()
        now = layer.dense_base_weight() == 0
        layer.unmerge()
        assert now[gone].all()  # requantising keeps every zero
        assert one.removed == int((gone & ~was).sum())
        assert one.rounded == int((now & ~was & ~gone).sum())
        assert one.filled == int((was & ~now).sum())
    assert report.total.rounded > 0


def test_a_mask_given_for_a_dense_base_is_refused_unless_the_base_is_to_be_masked():
    _, report = pruned()
    dense = tiny.llama(hidden=64, layers=2)
    model = adapted(copy.deepcopy(dense), mask="given")
    with pytest.raises(ValueError, match="masks_base=True"):
        set_masks(model, report.masks)
    model = adapted(dense, mask="given", masks_base=True)
    set_masks(model, report.masks)
    assert model.sparsity_report().total.merged_zeros == sum(report.zeros.values())
    with pytest.raises(ValueError, match="masks_base=False"):
        MaskedLoraConfig(mask="all", masks_base=False)
