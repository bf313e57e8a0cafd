"""Masks that an adapter starts with: one-shot criteria, with data and without, and masks from files."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_sparse_peft import MaskedLoraConfig, calibrate, callbacks_for, save_masks, set_masks
from hf_sparse_peft.hub import merge_to_dense
from hf_sparse_peft.pruning import NM, prune_model
from hf_sparse_peft.sparsity import check_n_of_m, decode_n_of_m, encode_n_of_m, pack_bits
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.masked_lora import MagnitudeMask, WandaMask
from hf_sparse_peft.utils.checksums import save_checked

TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(12)[None]


def adapted(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, MaskedLoraConfig(**{"r": 4, **TARGETS, **options}))


def kept(model):
    return {layer.module_name: layer.kept("default") for layer in adapter_layers(model)}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
def test_a_magnitude_mask_is_what_pruning_the_base_leaves(pattern):
    base, pruned = tiny.llama(hidden=64, layers=1), tiny.llama(hidden=64, layers=1)
    report = prune_model(pruned, method="magnitude", sparsity=0.5, pattern=pattern, show_progress=False)
    model = adapted(base, mask=MagnitudeMask(0.5, n_of_m=None if pattern is None else (2, 4)))
    assert all(torch.equal(pack_bits(~mask), report.masks[name]) for name, mask in kept(model).items())
    assert torch.allclose(logits(model), logits(pruned), atol=1e-5)


def test_a_wanda_mask_is_weight_times_norm_of_the_inputs_in_each_row(tmp_path):
    base = tiny.llama(hidden=64, layers=1)
    model = adapted(base, mask={"type": "wanda", "examples": 8})
    with pytest.raises(ValueError, match="starts from data"):
        model.train()(input_ids=IDS, labels=IDS)
    seen = {}
    hooks = [
        layer.get_base_layer().register_forward_pre_hook(
            lambda module, args, name=layer.module_name: seen.setdefault(name, []).append(args[0].detach().double())
        )
        for layer in adapter_layers(model)
    ]
    data = [{"input_ids": torch.arange(i, i + 12)[None] % 60, "labels": IDS} for i in range(8)]
    calibrate(model, data)
    for layer in adapter_layers(model):
        x = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen[layer.module_name]])
        W = layer.dense_base_weight().double()
        scores = W.abs() * x.square().sum(0).sqrt()
        order = scores.argsort(dim=1)[:, : W.shape[1] // 2]
        expected = torch.ones_like(W, dtype=torch.bool).scatter_(1, order, False)
        assert torch.equal(layer.kept("default"), expected), layer.module_name
    for hook in hooks:
        hook.remove()
    before = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(hidden=64, layers=1), str(tmp_path))
    assert torch.equal(logits(again), before)


def test_a_trainer_chooses_the_mask_from_its_own_data_and_merging_keeps_it(tmp_path):
    model = adapted(tiny.llama(hidden=64, layers=1), mask=WandaMask(0.25, n_of_m=(2, 4), examples=4))
    tiny.train(model, tmp_path, 2, callbacks=callbacks_for(model))
    masks = kept(model)
    merged = model.merge_and_unload()
    for name, mask in masks.items():
        assert (mask.view(-1, 4).sum(1) == 2).all()
        assert not merged.get_submodule(name).weight[~mask].any()


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4), (1, 2)])
def test_masks_in_a_file_are_read_and_checked(tmp_path, pattern):
    base, file = tiny.llama(hidden=64, layers=1), tmp_path / "masks.safetensors"
    report = prune_model(base, method="magnitude", pattern=pattern and NM(*pattern), show_progress=False)
    save_masks(report.masks, file, pattern)
    tensors = load_file(file)
    weights = sum(report.entries.values())
    per_weight = {None: 1, (2, 4): 2 / 3, (1, 4): 0.5, (1, 2): 0.5}[pattern]
    assert sum(t.numel() for t in tensors.values()) == pytest.approx(per_weight * weights / 8, rel=0.01)
    model = adapted(base, mask="given")
    set_masks(model, file)
    assert all(torch.equal(pack_bits(~mask), report.masks[name]) for name, mask in kept(model).items())
    name = next(iter(tensors))
    cut, wrong = {**tensors, name: tensors[name][:-1].clone()}, {name: tensors[name].clone().fill_(255)}
    about = {"hf_sparse_peft.masks": "bits" if pattern is None else f"{pattern[0]}:{pattern[1]}"}
    fresh = adapted(tiny.llama(hidden=64, layers=1), mask="given", masks_base=True)
    lies = [(cut, about, name), (tensors, {}, "no file of masks")]
    if pattern in ((2, 4),):
        lies.append(({**tensors, **wrong}, about, "at most 215"))
    for content, said, message in lies:
        save_checked(content, file, said)
        with pytest.raises(ValueError, match=message):
            set_masks(fresh, file)
    with pytest.raises(ValueError, match="is no file"):
        set_masks(fresh, tmp_path / "other")
    if pattern is None:
        with pytest.raises(ValueError, match="does not keep 2 of every 4"):
            save_masks(report.masks, file, (2, 4))


def test_codes_tell_every_way_of_two_of_four_and_lengths_that_fill_no_byte():
    ways = torch.tensor([[i >> j & 1 for j in range(4)] for i in range(16)]).bool()
    mask = ways[ways.sum(1) == 2].repeat(2, 1)[:7].reshape(-1)
    codes = encode_n_of_m(mask, 2, 4)
    assert codes.numel() == 3
    assert torch.equal(decode_n_of_m(codes, 28, 2, 4), mask)
    with pytest.raises(ValueError, match="behind its last group"):
        check_n_of_m(codes + torch.tensor([0, 0, 36], dtype=torch.uint8), 28, 2, 4)


@pytest.mark.parametrize("mask", ["given", WandaMask(0.5)], ids=str)
def test_a_mask_that_is_not_known_yet_removes_nothing(mask):
    base = tiny.llama(layers=1)
    before = logits(base)
    model = adapted(base, mask=mask, masks_base=True)
    if mask == "given":
        with pytest.raises(ValueError, match="set_masks"):
            logits(model)
    else:
        assert torch.equal(logits(model), before)
    for leave in (model.merge_adapter, lambda: merge_to_dense(model), model.sparsity_report, model.merge_and_unload):
        with pytest.raises(ValueError, match="set_masks" if mask == "given" else "calibrate"):
            leave()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
