"""Sliced models compute what masked ones do, are saved and loaded as they are, and a file that lies is refused."""

import copy

import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support_codes import checksums_by_hand
from test_structure import MODELS, build
from transformers.pytorch_utils import Conv1D

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.pruning import (
    KeptUnits,
    load_sliced,
    mask_units,
    save_sliced,
    slice_model,
    structures_of,
    unit_masks_of,
)

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
CHEAP = ("llama", "gemma3", "opt", "gpt2", "bert")
FAMILIES = [pytest.param(k, marks=[pytest.mark.slow] * (k not in CHEAP), id=k) for k in MODELS if k != "phi3"]


def kept_of(model, heads=(1, 2), channels=(20, 27)):
    """Other numbers of units in each block."""
    structures = structures_of(model)
    kept, generator = KeptUnits.all_of(structures), torch.Generator().manual_seed(0)
    for one, left, width in zip(structures, heads, channels, strict=True):
        kept.keep(one.name, "heads", torch.randperm(one.kv_heads, generator=generator)[:left])
        kept.keep(one.name, "channels", torch.randperm(one.width, generator=generator)[:width])
    return kept


def zeroed(model, kept):
    """A copy with zeros in all rows, biases and columns of what goes: written from the structures alone."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for one in structures_of(model):
            for kind in ("heads", "channels"):
                for member in one.members(kind):
                    layer, lines = model.get_submodule(member.module), member.lines(kept.blocks[one.name].removed(kind))
                    weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
                    weight.index_fill_(member.axis, lines, 0)
                    if member.axis == 0 and layer.bias is not None:
                        layer.bias[lines] = 0
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_sliced_model_computes_what_the_masked_and_the_zeroed_one_do(kind):
    model = build(kind)
    kept, dense, numbers = kept_of(model), logits(model), sum(p.numel() for p in model.parameters())
    expected = logits(zeroed(model, kept))
    masks = mask_units(model, kept)
    masked = logits(model)
    assert masks.kept().to_dict() == kept.to_dict()
    small = slice_model(model)
    assert unit_masks_of(small) is None
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(small), expected, rtol=1e-4, atol=1e-5)
    assert (dense - expected).abs().max() > 1e-3
    assert sum(p.numel() for p in small.parameters()) < numbers


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_blocks_of_unequal_sizes_come_back_from_their_folder_and_nothing_else_reads_it(kind, tmp_path):
    model = build(kind)
    kept = kept_of(model)
    small = slice_model(model, kept)
    save_sliced(small, tmp_path)
    again = load_sliced(tmp_path)
    assert type(again) is type(small)
    assert again.kept_units.to_dict() == kept.to_dict()
    assert torch.equal(logits(again), logits(small))
    with pytest.raises(RuntimeError, match="mismatch"):
        type(small).from_pretrained(tmp_path)


def test_a_save_that_dies_leaves_no_folder_or_one_that_is_refused_and_saving_again_mends_it(tmp_path, monkeypatch):
    small = slice_model(model := build("llama"), kept_of(model))

    def die(*args):
        raise KeyboardInterrupt

    for place, saved_before in ((tmp_path / "new", False), (tmp_path / "old", True)):
        if saved_before:
            save_sliced(small, place)
        with monkeypatch.context() as patched:
            patched.setattr(KeptUnits, "save", die)
            with pytest.raises(KeyboardInterrupt):
                save_sliced(small, place)
        assert place.exists() is saved_before
        if saved_before:  # its weights may be new, and its kept units the old ones
            with pytest.raises(ValueError, match=r"has no kept_units\.safetensors"):
                load_sliced(place)
        save_sliced(small, place)
        assert torch.equal(logits(load_sliced(place)), logits(small))


def test_a_config_says_what_all_blocks_have_in_common_and_transformers_alone_loads_it(tmp_path):
    small = slice_model(model := build("llama"), kept_of(model, (1, 1), (20, 20)))
    assert (small.config.num_key_value_heads, small.config.num_attention_heads) == (1, 2)
    assert small.config.intermediate_size == 20
    save_sliced(small, tmp_path)
    plain, ours = type(small).from_pretrained(tmp_path), load_sliced(tmp_path)
    assert torch.equal(logits(plain), logits(small))
    assert torch.equal(logits(ours), logits(small))
    assert ours.kept_units.to_dict() == small.kept_units.to_dict()


def test_a_sliced_model_generates_with_its_cache():
    model = build("llama")
    small = slice_model(model, kept_of(model))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 63}
    assert torch.equal(small.generate(IDS, **options), small.generate(IDS, use_cache=False, **options))


def test_what_is_left_is_quantised_while_it_is_loaded(tmp_path):
    """QLoRAM: slice, then NF4."""
    small = slice_model(model := tiny.llama(hidden=128), kept_of(model, (1, 2), (64, 128)))
    save_sliced(small, tmp_path)
    four_bit = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    loaded = load_sliced(tmp_path, quantization_config=four_bit, device_map="cpu", dtype=torch.float32)
    layer = loaded.model.layers[0].mlp.down_proj
    assert type(layer).__name__ == "Linear4bit"
    assert (layer.out_features, layer.in_features) == (128, 64)
    assert 0 < (logits(loaded) - logits(small)).abs().max() < 3
    with pytest.raises(ValueError, match="Slice the dense model"):
        slice_model(tiny.base("nf4"), kept_of(tiny.base("nf4")))


def test_a_lora_is_cut_with_its_base():
    model = build("llama")
    kept = kept_of(model)
    lora = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, lora)
    mask_units(model, kept)
    masked = logits(model)
    small = slice_model(model)
    torch.testing.assert_close(logits(small), masked, rtol=1e-4, atol=1e-5)
    gate = small.get_base_model().model.layers[0].mlp.gate_proj
    assert gate.lora_B["default"].weight.shape == (20, 3)
    assert gate.out_features == 20
    torch.testing.assert_close(logits(small.merge_and_unload()), masked, rtol=1e-4, atol=1e-5)


def rewrite(folder, checksum=True, **changed):
    file = folder / "kept_units.safetensors"
    tensors = {**load_file(file), **changed}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    if checksum:
        metadata["crc32"] = checksums_by_hand(tensors, metadata)
    save_file(tensors, file, metadata=metadata)


def test_kept_units_that_lie_are_refused(tmp_path):
    small = slice_model(model := build("llama"), kept_of(model))
    save_sliced(small, tmp_path)
    name = "model.layers.1.channels"
    as_many = load_file(tmp_path / "kept_units.safetensors")[name].clone()
    as_many[-1] += 1 if as_many[-1] < 47 else -1
    rewrite(tmp_path, checksum=False, **{name: as_many})
    with pytest.raises(ValueError, match=f"{name}.*checksum"):
        load_sliced(tmp_path)
    rewrite(tmp_path, **{name: torch.arange(26)})
    with pytest.raises(ValueError, match="shape"):
        load_sliced(tmp_path)
    rewrite(tmp_path, **{name: torch.arange(27) + 40})
    with pytest.raises(ValueError, match="below 48"):
        load_sliced(tmp_path)
    (tmp_path / "kept_units.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="truncated"):
        load_sliced(tmp_path)
    (tmp_path / "kept_units.safetensors").unlink()
    with pytest.raises(ValueError, match="no folder of save_sliced"):
        load_sliced(tmp_path)


def none_left(model):
    kept = kept_of(model)
    kept.keep("model.layers.0", "heads", torch.tensor([], dtype=torch.int64))
    return model, kept


def of_another(model):
    return model, kept_of(tiny.llama(layers=2, hidden=64))


def twice(model):
    kept = kept_of(model)
    return slice_model(model, kept), kept


def with_entries(model):
    kept = kept_of(model)
    return get_peft_model(model, SparseLoraConfig(density=0.1, target_modules="all-linear")), kept


def with_dora(model):
    kept = kept_of(model)
    return get_peft_model(model, LoraConfig(use_dora=True, target_modules=["down_proj"])), kept


def shared(model):
    kept = kept_of(model)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model, kept


def fused(_):
    model = build("phi3")
    return model, kept_of(model)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (none_left, "one at least"), (of_another, "load the model that was pruned"), (twice, "sliced before"),
        (with_entries, "no plain LoRA"), (with_dora, "no plain LoRA"), (shared, "share one weight"),
        (fused, "config's number of heads"),
    ],
)  # fmt: skip
def test_what_cannot_be_sliced_is_refused_and_stays_as_it_was(prepare, message):
    model, kept = prepare(build("llama"))
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        slice_model(model, kept)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_model_without_slices_has_no_sliced_files(tmp_path):
    with pytest.raises(ValueError, match="was not sliced"):
        save_sliced(build("llama"), tmp_path)
    small = slice_model(model := build("llama"), kept_of(model))
    with pytest.raises(ValueError, match="has an adapter"):
        save_sliced(get_peft_model(small, LoraConfig(target_modules="all-linear")), tmp_path)
