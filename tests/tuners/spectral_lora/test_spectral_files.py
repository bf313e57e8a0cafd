"""Files of spectral adapters that lie are refused by the tensor's or option's name, and leave the model as it was."""

import json

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from spectral_forms import FORMS, adapted, logits

from hf_sparse_peft import SpectralLoraConfig, hub
from hf_sparse_peft.tuners.spectral_lora import SVD, Diagonal, RandomBases, SharedBases
from hf_sparse_peft.utils.checksums import save_checked

KEY = "base_model.model.model.layers.0.self_attn.q_proj.spectral_lora_"


def tampered(folder, tensors=None, options=None):
    """Change tensors by key (None: gone) and options of a saved adapter."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    held = load_file(file) | (tensors or {})
    save_checked({key: tensor for key, tensor in held.items() if tensor is not None}, file, {"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), **(options or {})}))


@pytest.mark.parametrize(
    ("form", "tensors", "options", "message"),
    [
        ("combination", {}, {"generator": "hash64"}, "generator='hash64' drew this adapter's bases"),
        ("combination", {"shape": None}, {}, r"spectral_lora_shape' is missing"),
        ("combination", {"shape": torch.tensor([32, 48])}, {}, r"q_proj.spectral_lora_shape.* is \[32, 48\]"),
        ("combination", {"shape": torch.tensor([0, 32])}, {}, "no shape of a weight"),
        ("combination", {"A_coefficients": torch.zeros(5)}, {}, r"A_coefficients' in .* has shape \(5,\)"),
        ("combination", {"B_coefficients": torch.full((6,), torch.nan)}, {}, "not finite"),
        ("combination", {"basis_A": torch.zeros(3, 32)}, {}, "has no place"),
        ("full core", {"basis_B": torch.zeros(32, 2)}, {}, r"basis_B' in .* has shape \(32, 2\)"),
        ("full core", {}, {"r": 4}, "has shape"),
        ("full core", {}, {"core": {"type": "diagonal"}}, r"core' in .* has shape"),
        ("full core", {}, {"core": {"type": "ring"}}, "core=.* cannot be used here: its type 'ring' is not"),
        ("shared A", {"A": None}, {}, r"spectral_lora_A' is missing"),
        ("shared A", {}, {"sizes": {}}, "sizes has no entry for"),
        ("shards", {"A": torch.zeros(16, 8)}, {}, r"spectral_lora_A' in .* has shape \(16, 8\)"),
    ],
)  # fmt: skip
def test_a_file_that_lies_is_refused_by_name(form, tensors, options, message, tmp_path):
    adapted(form).save_pretrained(tmp_path)
    tampered(tmp_path, {KEY + name: tensor for name, tensor in tensors.items()}, options)
    base = tiny.base()
    keys, before = list(base.state_dict()), logits(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == keys
    assert torch.equal(logits(base), before)


def test_sizes_of_other_owners_are_refused_with_and_without_a_model(tmp_path):
    adapted("shared A").save_pretrained(tmp_path)
    sizes = json.loads((tmp_path / "adapter_config.json").read_text())["sizes"]
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    assert sizes[second] == [first, 2, 1]
    for wrong, message in (
        ({**sizes, second: [second, 1, 0]}, "spectral_lora_A' is missing"),
        ({**sizes, second: [first, 2, 2]}, "is not \\[owner, users, position\\]"),
        ({**sizes, "model.layers.7.self_attn.q_proj": [first, 2, 1]}, "The file is incomplete"),
    ):
        tampered(tmp_path, options={"sizes": wrong})
        with pytest.raises(ValueError, match=message):
            hub.check_adapter(tmp_path)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(tiny.base(), tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_files_without_bases_say_how_these_follow_from_the_seed(form, tmp_path):
    adapted(form).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    drawn = {"bases found again", "two factors", "random A", "combination", "shards", "subspace"}
    assert options.get("generator") == ("hash32" if form in drawn else None)


def test_an_adapter_without_stored_bases_does_not_load_on_a_base_of_other_sides(tmp_path):
    adapted("combination").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="spectral_lora_shape"):
        PeftModel.from_pretrained(tiny.base(hidden=64), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "SpectralLoraConfig.r=0 is out of range"),
        ({"core": None}, "leaves nothing to train between SVD"),
        ({"bases": "svdd"}, "bases='svdd' is unknown"),
        ({"bases": RandomBases(), "core": Diagonal("values")}, "starts from a spectrum"),
        ({"bases": RandomBases(4, 5), "core": Diagonal()}, "A diagonal core is square"),
        ({"bases": SharedBases(), "core": Diagonal(residual="init")}, "keeps a part of each weight"),
        ({"bases": {"type": "shards", "e": 1, "p": 2}}, "Shards.p=2 is out of range"),
        ({"bases": {"type": "shards", "l": 5}, "core": None}, "Shards.l=5 does not divide both sides"),
        ({"bases": {"type": "fastfood"}}, "makes whole updates: set core=None"),
        ({"bases": SVD(), "core": {"type": "band", "width": -1}}, "Band.width=-1 is out of range"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused_by_name(options, message):
    from peft import get_peft_model

    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny.base(), SpectralLoraConfig(**{"r": 3, "target_modules": ["q_proj"], **options}))
