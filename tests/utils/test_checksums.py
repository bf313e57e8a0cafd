"""Checksums of safetensors files: what was damaged on the way is found and named."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support_codes import checksums_by_hand

from hf_sparse_peft.utils.checksums import save_checked
from hf_sparse_peft.utils.file_length import read_safetensors

TENSORS = {
    "b": torch.arange(6.0).view(2, 3), "a.half": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(2),
    "bits": torch.tensor([True, False]), "none": torch.empty(0), "f8": torch.ones(2).to(torch.float8_e4m3fn),
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    save_checked(TENSORS, tmp_path / "t.safetensors", {"format": "pt", "about": "x"})
    return tmp_path / "t.safetensors"


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_whole_file_is_read_and_its_checksums_are_those_of_name_dtype_shape_and_bytes(file):
    tensors, about = read_safetensors(file)
    assert all(torch.equal(tensors[name].float(), one.float()) for name, one in TENSORS.items())
    plain = {**TENSORS, "a.half": TENSORS["a.half"].view(torch.uint8), "f8": TENSORS["f8"].view(torch.uint8)}
    by_hand = checksums_by_hand({name: plain[name] for name in ("b", "c", "bits", "none")}, about)
    digits = {name: about["crc32"][8 * at : 8 * at + 8] for at, name in enumerate(sorted(TENSORS))}
    assert by_hand == "".join(digits[name] for name in ("b", "bits", "c", "none")) + about["crc32"][-8:]
    assert len(about["crc32"]) == 8 * (len(TENSORS) + 1)


@pytest.mark.parametrize("name", [name for name, one in TENSORS.items() if one.numel()])
def test_one_bit_of_one_tensor_is_found_by_name(file, name):
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8:length])
    content = bytearray(file.read_bytes())
    content[length + header[name]["data_offsets"][0]] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"'{name}' in .*checksum"):
        read_safetensors(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, about: t.pop("c"), "checksums of 6"), (lambda t, about: t.update(d=torch.ones(1)), "checksums of 6"),
        (lambda t, about: t.update(d=t.pop("c")), "'d' in"), (lambda t, about: t.update(b=t["b"].view(3, 2)), "'b' in"),
        (lambda t, about: t.update(b=t["b"].view(torch.int32)), "'b' in"),
        (lambda t, about: about.update(about="y"), "__metadata__"),
        (lambda t, about: about.update(crc32=""), "checksums"),
    ],
    ids=["dropped", "added", "renamed", "shape", "dtype", "metadata", "no digits"],
)  # fmt: skip
def test_other_tensors_under_the_checksums_are_refused(file, change, message):
    tensors, about = load_file(file), metadata(file)
    change(tensors, about)
    save_file(tensors, file, about)
    with pytest.raises(ValueError, match=message):
        read_safetensors(file)


def test_file_by_another_hand_has_none_and_is_read(file):
    save_file(TENSORS, file, {"format": "pt"})
    assert set(read_safetensors(file)[0]) == set(TENSORS)
