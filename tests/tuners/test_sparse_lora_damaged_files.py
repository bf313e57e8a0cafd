"""A damaged adapter file stops at once, by the name of its tensor, before a layer changes."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft import set_peft_model_state_dict as set_state
from safetensors.torch import load_file
from support_codes import chunks_of, seal
from tuner_toolbox import base_bits, fill, make_config, same_bits, saved, tiny_llama

from hf_sparse_peft.utils.checksums import save_checked

FILE = "adapter_model.safetensors"


def key_of(tensors, part):
    return next(key for key in sorted(tensors) if part in key)


def damage(kind, tensors):
    """Break one tensor of a file; returns its name."""
    if kind in ("wrong values shape", "NaN values", "missing values"):
        key = key_of(tensors, "sparse_lora_values")
        if kind == "wrong values shape":
            tensors[key] = tensors[key][:-1].clone()
        elif kind == "NaN values":
            tensors[key][2] = float("nan")
        else:
            del tensors[key]
        return key
    if kind in ("wrong A shape", "infinite B", "missing B"):
        key = key_of(tensors, "sparse_lora_A" if "A" in kind else "sparse_lora_B")
        if kind == "wrong A shape":
            tensors[key] = torch.zeros(5, tensors[key].shape[1])
        elif kind == "infinite B":
            tensors[key][0, 0] = float("inf")
        else:
            del tensors[key]
        return key
    key = key_of(tensors, "sparse_lora_support")
    codes = tensors[key].clone()
    if kind == "missing support":
        del tensors[key]
        return key
    if kind == "truncated support":
        codes = codes[:-9]
    elif kind == "header only":
        codes = codes[:10]
    elif kind == "blank support":
        codes.zero_()
    elif kind == "flipped bit":
        codes[30] ^= 1
    elif kind == "duplicated unit":  # a unit in the last chunk that the header does not count
        codes[24 + len(chunks_of(codes)) - 1] += 1
        seal(codes)
    elif kind == "unit out of range":  # the last unit is pushed out of the last chunk
        chunks = len(chunks_of(codes))
        codes[24 : 24 + chunks] = 0
        codes[24 + chunks - 1], codes[8] = 1, 1
        codes[9:12], codes[24 + chunks :] = 0, 0
        codes[24 + chunks] = 254
        seal(codes)
    elif kind == "wrong count":
        codes[8] += 1
    elif kind == "other version":
        codes[2] = 9
    elif kind == "not codes":
        codes[0] = 0
    elif kind == "other base shape":
        codes[12] += 1
    elif kind == "other granularity":
        codes[3] = 2
    elif kind == "wrong dtype":
        codes = codes.to(torch.int32)
    tensors[key] = codes
    return key


DAMAGES = [
    "truncated support", "header only", "blank support", "flipped bit", "duplicated unit", "unit out of range",
    "wrong count", "other version", "not codes", "other base shape", "other granularity", "wrong dtype",
    "missing support", "wrong values shape", "NaN values", "missing values", "wrong A shape", "infinite B", "missing B",
]  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_file_is_refused_by_name_before_a_layer_changes(base_of, tmp_path, kind):
    saved(tmp_path, base_of)
    tensors = load_file(tmp_path / FILE)
    key = damage(kind, tensors).removeprefix("base_model.model.")
    save_checked(tensors, tmp_path / FILE, {"format": "pt"})
    model = get_peft_model(base_of(), make_config(seed=4))
    fill(model, seed=11)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        set_state(model, tensors)
    assert key in str(error.value)
    assert same_bits(dict(model.state_dict()), before)
    base = base_of()
    bits = base_bits(base)
    for meta in (False, True):
        with pytest.raises(ValueError) as error:
            PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=meta)
        assert key in str(error.value)
        assert same_bits(base_bits(base), bits)
        base = base_of()


@pytest.mark.parametrize("kind", DAMAGES)
def test_transformers_load_adapter_of_a_damaged_file_is_refused_and_leaves_the_model(base_of, tmp_path, kind):
    saved(tmp_path, base_of)
    tensors = load_file(tmp_path / FILE)
    key = damage(kind, tensors)
    save_checked(tensors, tmp_path / FILE, {"format": "pt"})
    model = base_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        model.load_adapter(str(tmp_path))  # assigns tensors past peft's hooks
    assert key in str(error.value)
    assert same_bits(dict(model.state_dict()), before)
    assert not hasattr(model, "peft_config")


def test_file_for_another_base_is_refused(base_of, tmp_path):
    saved(tmp_path, base_of)
    wider = tiny_llama(hidden_size=128)
    with pytest.raises(ValueError, match="sparse_lora_"):
        PeftModel.from_pretrained(wider, tmp_path)


@pytest.mark.parametrize("part", [0, 5, 0.5, -1], ids=["empty", "no header", "half", "one byte short"])
def test_byte_truncated_safetensors_file_is_refused(base_of, tmp_path, part):
    saved(tmp_path, base_of)
    content = (tmp_path / FILE).read_bytes()
    length = int(len(content) * part) if isinstance(part, float) else part % len(content)
    (tmp_path / FILE).write_bytes(content[:length])
    base = base_of()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors' is truncated"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any("sparse_lora" in name for name, _ in base.named_modules()), "layers changed for a cut file"
