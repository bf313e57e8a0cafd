"""An adapter that was damaged or put together from two saves is not loaded as another adapter."""

import json

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_sparse_peft import (
    FactoredConfig,
    KernelLoraConfig,
    MaskedLoraConfig,
    SparseLoraConfig,
    SpectralLoraConfig,
    StructuredConfig,
)
from hf_sparse_peft.hub import check_adapter, save_adapter, write_checksums
from hf_sparse_peft.tuners.structured import Kronecker
from hf_sparse_peft.utils.file_length import read_safetensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIONS = {"target_modules": ["q_proj"]}
CONFIGS = {
    "sparse_lora": lambda **more: SparseLoraConfig(**OPTIONS, r=2, density=0.05, **more),
    "kernel_lora": lambda **more: KernelLoraConfig(**OPTIONS, r=4, **more),
    "spectral_lora": lambda **more: SpectralLoraConfig(**OPTIONS, r=2, **more),
    "masked_lora": lambda **more: MaskedLoraConfig(**OPTIONS, r=2, mask="all", **more),
    "structured": lambda **more: StructuredConfig(**OPTIONS, form=Kronecker(4, 2), **more),
    "factored": lambda **more: FactoredConfig(**OPTIONS, **more),
}


def base():
    return tiny.llama(layers=1, hidden=16).eval()


def saved(folder, tuner="sparse_lora", **options):
    get_peft_model(base(), CONFIGS[tuner](**options)).save_pretrained(folder)
    return folder


def edit(folder, **options):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def refused(folder, message):
    model = base()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for load in (
        lambda: check_adapter(folder),
        lambda: PeftModel.from_pretrained(model, folder),
        lambda: model.load_adapter(str(folder)),
        lambda: get_peft_model(base(), CONFIGS["sparse_lora"]()).load_adapter(folder, "new"),
    ):
        with pytest.raises(ValueError, match=message):
            load()
        assert all(model.state_dict()[name].equal(tensor) for name, tensor in before.items())
        assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("tuner", CONFIGS)
def test_one_bit_of_a_trained_value_is_found_by_the_tensors_name(tmp_path, tuner):
    saved(tmp_path, tuner)
    check_adapter(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-2] ^= 4  # still a finite number of about that size
    (tmp_path / WEIGHTS).write_bytes(content)
    refused(tmp_path, f"base_model.*{tuner}.*checksum")


def test_config_of_another_save_is_refused_by_the_option(tmp_path):
    saved(tmp_path / "a", lora_alpha=8)
    saved(tmp_path / "b", lora_alpha=16)
    (tmp_path / "a" / CONFIG).write_bytes((tmp_path / "b" / CONFIG).read_bytes())
    refused(tmp_path / "a", r"lora_alpha=16.*config=")
    edit(tmp_path / "a", lora_alpha=8, use_rslora=True)
    refused(tmp_path / "a", "use_rslora=True")


@pytest.mark.parametrize(("tuner", "option", "value"), [
    ("kernel_lora", "sparsity", 0.4), ("kernel_lora", "mode", "code"), ("spectral_lora", "lora_alpha", 3.0),
    ("masked_lora", "lora_alpha", 3.0), ("sparse_lora", "alpha_pattern", {"q_proj": 3.0}),
])  # fmt: skip
def test_options_that_no_shape_tells_are_compared_in_every_tuner(tmp_path, tuner, option, value):
    saved(tmp_path, tuner)
    edit(tmp_path, **{option: value})
    with pytest.raises(ValueError, match=option):
        check_adapter(tmp_path)


def test_what_does_not_say_what_the_tensors_mean_may_be_edited(tmp_path):
    saved(tmp_path)
    edit(tmp_path, base_model_name_or_path="elsewhere/base", revision="main", inference_mode=False, schedule=[])
    check_adapter(tmp_path)
    edit(tmp_path, an_option_of_a_newer_release=1)
    with pytest.warns(UserWarning, match="does not know"):
        check_adapter(tmp_path)


def test_another_option_on_purpose_is_given_as_a_config(tmp_path):
    saved(tmp_path, lora_alpha=8)
    config = CONFIGS["sparse_lora"](lora_alpha=16)
    loaded = PeftModel.from_pretrained(base(), tmp_path, config=config)
    assert loaded.peft_config["default"].lora_alpha == 16


def test_adapters_under_other_names_and_with_a_card_have_checksums_and_pefts_own_are_left_alone(tmp_path):
    model = get_peft_model(base(), CONFIGS["sparse_lora"](), adapter_name="mine")
    model.add_adapter("second", CONFIGS["sparse_lora"](lora_alpha=3.0))
    model.save_pretrained(tmp_path)
    save_adapter(model, tmp_path / "card", adapter_name="second")
    for folder in (tmp_path / "mine", tmp_path / "second", tmp_path / "card"):
        check_adapter(folder)
        with safe_open(folder / WEIGHTS, "pt") as opened:
            assert {"crc32", "options", "format"} <= set(opened.metadata())
    get_peft_model(base(), LoraConfig(r=2, **OPTIONS)).save_pretrained(tmp_path / "lora")
    with safe_open(tmp_path / "lora" / WEIGHTS, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("tuner", CONFIGS)
@pytest.mark.parametrize("metadata", [
    None, {"format": "pt"}, {"format": "pt", "crc32x": "0" * 40}, {"format": "pt", "total_size": "3"},
], ids=str)  # fmt: skip
def test_weights_without_checksums_are_refused_whatever_else_their_metadata_says(tmp_path, tuner, metadata):
    saved(tmp_path, tuner)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    refused(tmp_path, r"has no checksums.*write_checksums")
    held = PeftModel.from_pretrained(base(), saved(tmp_path / "other", tuner))
    (tmp_path / CONFIG).unlink()  # the adapter that is there says what its tensors mean
    with pytest.raises(ValueError, match="has no checksums"):
        held.load_adapter(tmp_path, "default")


def test_weights_that_another_program_wrote_are_read_once_somebody_says_that_they_are_meant(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("_A"))
    tensors[key].mul_(2)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt", "note": "scaled"})
    write_checksums(tmp_path)
    check_adapter(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded.state_dict()[f"{key}.default"], tensors[key])
    assert read_safetensors(tmp_path / WEIGHTS)[1]["note"] == "scaled"
    edit(tmp_path, use_rslora=True)
    refused(tmp_path, "use_rslora=True")


def test_checksums_are_not_written_over_those_that_do_not_match_nor_over_half_an_adapter(tmp_path):
    saved(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-2] + bytes([whole[-2] ^ 4, whole[-1]]))
    damaged = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="checksum"):
        write_checksums(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == damaged
    (tmp_path / WEIGHTS).write_bytes(whole)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k: t for k, t in tensors.items() if not k.endswith("_B")}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="sparse_lora_B"):
        write_checksums(tmp_path)


@pytest.mark.parametrize("tuner", CONFIGS)
def test_adapters_that_transformers_saves_have_checksums_and_pefts_own_and_plain_models_are_left_alone(tmp_path, tuner):
    model = base()
    model.add_adapter(CONFIGS[tuner](), "mine")
    model.save_pretrained(tmp_path / "mine")
    assert {"crc32", "options", "format"} <= set(read_safetensors(tmp_path / "mine" / WEIGHTS)[1])
    check_adapter(tmp_path / "mine")
    ids = torch.arange(1, 9)[None]
    loaded = base()
    loaded.load_adapter(str(tmp_path / "mine"))
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    other = base()
    other.add_adapter(LoraConfig(r=2, **OPTIONS))
    other.save_pretrained(tmp_path / "lora")
    assert read_safetensors(tmp_path / "lora" / WEIGHTS)[1] == {"format": "pt"}
    base().save_pretrained(tmp_path / "plain")
    assert read_safetensors(tmp_path / "plain" / "model.safetensors")[1] == {"format": "pt"}


@pytest.mark.parametrize("tuner", sorted({*CONFIGS} - {"factored"}))  # which adapts what its file has sizes of
def test_config_that_targets_what_no_adapter_can_be_on_is_refused_by_the_module(tmp_path, tuner):
    saved(tmp_path, tuner)
    tensors, _ = read_safetensors(tmp_path / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    edit(tmp_path, target_modules=["q_proj", "0"])
    write_checksums(tmp_path)  # the config, too, is meant
    model = base()
    before = [(name, id(module)) for name, module in model.named_modules()]
    for load in (lambda: PeftModel.from_pretrained(model, tmp_path), lambda: model.load_adapter(str(tmp_path))):
        with pytest.raises(ValueError, match=r"adapter_model.*'model\.layers\.0'.*LlamaDecoderLayer"):
            load()
        assert [(name, id(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("tuner", CONFIGS)
def test_adapter_is_loaded_under_the_config_that_it_was_made_with(tmp_path, tuner):
    # Injection writes sizes into a copy: the config that was given knows none of them.
    config = CONFIGS[tuner]()
    model = get_peft_model(base(), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path, config=config)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_config_that_is_nested_without_a_bound_is_refused(tmp_path):
    saved(tmp_path)
    deep = []
    for _ in range(900):
        deep = [deep]
    for option in ("an_option_of_a_newer_release", "rank_pattern"):
        edit(tmp_path, **{option: deep})
        refused(tmp_path, "adapter_config.json'.*nests")


def test_tensors_that_lost_their_checksums_alone_are_refused(tmp_path):
    get_peft_model(tiny.llama(), SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    tensors, metadata = read_safetensors(tmp_path / WEIGHTS)
    del metadata["crc32"]
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    with pytest.raises(ValueError, match="has no checksums"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
