"""Masks of adapters as codes of their N:M groups: the same adapter in fewer bytes."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_sparse_peft import MaskedLoraConfig, Prune, set_masks, sparsity_report
from hf_sparse_peft.pruning import NM, prune_model
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.masked_lora import MagnitudeMask
from hf_sparse_peft.utils.checksums import save_checked

IDS = torch.arange(12)[None]


def pruned(keep=2, of=4, **options):
    model = tiny.llama(hidden=48, layers=1, **options)
    return model, prune_model(model, method="magnitude", pattern=NM(keep, of), show_progress=False)


def adapted(base, **options):
    torch.manual_seed(1)
    return get_peft_model(base, MaskedLoraConfig(**{"r": 4, "init_weights": False, "target_modules": "all-linear",
                                                    "task_type": "CAUSAL_LM", **options}))  # fmt: skip


def passes(model):
    """Logits and gradients of one pass."""
    model.zero_grad()
    out = model.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def mask_bytes(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return sum(tensor.numel() for key, tensor in tensors.items() if key.endswith("masked_lora_mask"))


@pytest.mark.parametrize(("keep", "of", "bits"), [(2, 4, 2 / 3), (1, 4, 1 / 2), (1, 8, 1 / 2)])
def test_codes_are_the_same_adapter_in_fewer_bytes(keep, of, bits, tmp_path):
    base, _ = pruned(keep, of)
    weights = sum(m.weight.numel() for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lm" not in n)
    found = {}
    for name, n_of_m in (("bits", None), ("codes", [keep, of])):
        model = adapted(copy.deepcopy(base), n_of_m=n_of_m)
        model.save_pretrained(tmp_path / name)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, is_trainable=True)
        found[name] = [passes(model), passes(again)]
    for one in (*found["codes"], found["bits"][1]):
        assert all(torch.equal(a, b) for a, b in zip(one, found["bits"][0], strict=True))
    assert mask_bytes(tmp_path / "bits") == weights / 8
    groups = sum(-(-(m.weight.numel() // of) // (of * 3 // 4 if of == 4 and keep == 2 else 16 // of))
                 for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lm" not in n)  # fmt: skip
    assert mask_bytes(tmp_path / "codes") == groups
    assert groups == pytest.approx(bits * weights / 8, rel=0.01)
    merged = again.merge_and_unload()
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(merged.get_submodule(name).weight == 0, module.weight == 0)


def test_masks_that_are_given_or_chosen_are_coded_too(tmp_path):
    base, report = pruned()
    given = adapted(copy.deepcopy(base), mask="given", n_of_m=[2, 4])
    assert not any(layer.knows_mask("default") for layer in adapter_layers(given))
    with pytest.raises(ValueError, match="does not know yet"):
        passes(given)
    set_masks(given, report.masks)
    zeros = adapted(copy.deepcopy(base), n_of_m=[2, 4])
    for a, b in zip(adapter_layers(given), adapter_layers(zeros), strict=True):
        assert torch.equal(a.kept("default"), b.kept("default"))
        assert torch.equal(a.masked_lora_mask["default"], b.masked_lora_mask["default"])
    chosen = adapted(tiny.llama(hidden=48, layers=1), mask=MagnitudeMask(n_of_m=(2, 4)), n_of_m=(2, 4))
    for layer in adapter_layers(chosen):
        assert bool((layer.kept("default").view(-1, 4).sum(1) == 2).all())
    tiny.train(chosen, tmp_path, 2)
    told = {one.name: one.removed for one in sparsity_report(chosen).layers if "lm_head" not in one.name}
    merged = chosen.merge_and_unload()
    for name, removed in told.items():
        weight = merged.get_submodule(name).weight
        assert int((weight == 0).sum()) == removed == weight.numel() // 2


def test_on_a_4_bit_base_too():
    report = prune_model(tiny.llama(), method="magnitude", pattern=NM(2, 4), show_progress=False)
    found = []
    for n_of_m in (None, [2, 4]):
        model = adapted(tiny.base("nf4"), mask="given", n_of_m=n_of_m, masks_base=True)
        set_masks(model, report.masks)
        found.append(passes(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_byte_that_codes_nothing_is_refused(tmp_path):
    base, _ = pruned()
    adapted(copy.deepcopy(base), n_of_m=[2, 4]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("masked_lora_mask"))
    for change, message in ((lambda t: t.index_fill(0, torch.tensor([3]), 250), "at most 215"), (lambda t: t[1:], key)):
        save_checked(tensors | {key: change(tensors[key]).contiguous()}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)


def test_masks_of_another_form_are_refused():
    base, _ = pruned()
    loose = tiny.llama(hidden=48, layers=1)
    prune_model(loose, method="magnitude", sparsity=0.5, show_progress=False)
    first = tiny.llama(hidden=48, layers=1)
    for module in (m for n, m in first.named_modules() if isinstance(m, torch.nn.Linear) and "lm" not in n):
        module.weight.data.view(-1, 4)[:, 2:] = 0
    for model, options, message in (
        (base, {"n_of_m": [4, 4]}, "takes .kept, of."),
        (base, {"n_of_m": [8, 16]}, "12870 ways"),
        (base, {"n_of_m": [2, 4], "mask": "all"}, "starts with all"),
        (base, {"n_of_m": [2, 4], "schedule": [Prune(0.1, space="mask")]}, "here it moves"),
        (base, {"n_of_m": [2, 4], "mask": MagnitudeMask(0.5)}, "chooses others"),
        (base, {"n_of_m": [5, 7]}, "do not divide the 48 inputs"),
        (loose, {"n_of_m": [2, 4]}, "does not keep 2 of every 4"),
        (first, {"n_of_m": [2, 4]}, "first entries of all groups"),
    ):
        with pytest.raises(ValueError, match=message):
            adapted(copy.deepcopy(model), **options)
