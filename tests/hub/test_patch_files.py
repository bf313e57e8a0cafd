"""Files of patches: ours in few bytes, and slime's delta directories as its hosts read them."""

import json

import pytest
import tiny
import torch
from hub_toolbox import adapted, tiny_base
from patch_toolbox import bits, merged_state, patched_state, pull_as_slime, saved_state
from safetensors.torch import load_file, save_file
from support_codes import checksums_by_hand

from hf_sparse_peft import hub
from hf_sparse_peft.hub.patches import positions as coding
from hf_sparse_peft.hub.patches.slime import check_size, decode_delta, encode_delta

needs_zstd = tiny.needs("zstandard>=0.23")


def equal(one, other):
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


@pytest.mark.parametrize("size", [1, 7, 8, 1000, 65_536, 1_000_003])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 1.0])
def test_positions_come_back_from_their_code(size, share):
    generator = torch.Generator().manual_seed(size)
    positions = torch.randperm(size, generator=generator)[: round(size * share)].sort().values
    codes = coding.encode(positions, size)
    assert codes.numel() == coding.code_length(positions.numel(), size)
    assert torch.equal(coding.decode(codes, positions.numel(), size, "w"), positions)
    starts, ends = coding.runs_of(positions)
    assert torch.equal(coding.positions_of(starts, ends), positions)


def test_a_random_support_takes_half_a_bit_more_than_its_entropy():
    size = 4_000_000
    positions = torch.nonzero(torch.rand(size, generator=torch.Generator().manual_seed(0)) < 1e-3).view(-1)
    assert 8 * coding.encode(positions, size).numel() / positions.numel() < 11.4 + 0.6  # log2(e / 0.001) = 11.4


@pytest.mark.parametrize("granularity", ["row", "block", "column"])
def test_positions_of_rows_blocks_and_columns_cost_nearly_nothing(tmp_path, granularity):
    patch = hub.make_patch(adapted(tiny_base(hidden=128), granularity=granularity), keep_unchanged=True)
    size = hub.write_patch(patch, tmp_path / "p.safetensors")
    tensors = load_file(tmp_path / "p.safetensors")
    coded = sum(t.numel() for name, t in tensors.items() if not name.endswith(":values"))
    assert coded <= 0.06 * 4 * patch.entries
    assert size > 4 * patch.entries
    back = hub.read_patch(tmp_path / "p.safetensors")
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(patch.weights, back.weights, strict=True))


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    file = tmp_path / "p.safetensors"
    hub.write_patch(hub.make_patch(adapted()), file)
    whole = file.read_bytes()
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    name = next(key for key in tensors if key.endswith(":positions"))
    for change, message in (
        (lambda t: t[:-1], "bytes where"),
        (lambda t: t ^ 255, "damaged"),
        (lambda t: t.to(torch.int16), "damaged"),
    ):
        changed = {**tensors, name: change(tensors[name])}
        save_file(changed, file, metadata={**header, "crc32": checksums_by_hand(changed, header)})
        with pytest.raises(ValueError, match=message):
            hub.read_patch(file)
    save_file(tensors, file, metadata={key: value for key, value in header.items() if key != "crc32"})
    with pytest.raises(ValueError, match="no checksums"):
        hub.read_patch(file)
    file.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"p\.safetensors' is truncated"):
        hub.read_patch(file)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="no weight patch"):
        hub.read_patch(file)
    with pytest.raises(ValueError, match=r"neither patch\.safetensors"):
        hub.read_patch(tmp_path)


def test_slimes_worked_bytes():
    old, new = torch.tensor([1, 2, 3, 4.0]).bfloat16(), torch.tensor([1, 2, 3.5, 4.0]).bfloat16()
    a, b = old.view(torch.uint8), new.view(torch.uint8)
    assert a.numpy().tobytes().hex() == "803f004040408040"
    assert encode_delta(a, b, "overwrite").hex() == "010000000400000060"
    assert encode_delta(a, b, "xor").hex() == "0000000020000000"
    from hf_sparse_peft.hub.patches.slime import _checksum

    assert _checksum("adler32")(b.numpy()) == "0a810260"
    for encoding in ("overwrite", "xor"):
        delta = encode_delta(a, b, encoding)
        assert torch.equal(decode_delta(a, delta, encoding), b)
        assert torch.equal(decode_delta(b, delta, encoding), b if encoding == "overwrite" else a)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.float16])
def test_bytes_of_every_dtype_survive(dtype):
    raw = torch.randint(0, 256, (4, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).view(-1)
    new = raw.clone()
    new[5:9] = 255 - new[5:9]
    for encoding in ("overwrite", "xor"):
        back = decode_delta(raw, encode_delta(raw, new, encoding), encoding)
        assert bits(back.view(dtype)) == bits(new.view(dtype))


def test_positions_beyond_32_bits_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'experts' has 4,294,967,296 bytes.*encoding='xor'"):
        check_size("experts", 2**32, "overwrite")
    check_size("experts", 2**32, "xor")
    check_size("experts", 2**32 - 1, "overwrite")


@needs_zstd
def test_an_oversized_tensor_is_refused_before_anything_is_written(tmp_path):
    huge = hub.WeightPatch("big", (2**31,), torch.bfloat16, torch.zeros(1).bfloat16(), torch.tensor([3]))
    with pytest.raises(ValueError, match="'big' has"):
        hub.write_slime_delta(hub.Patch((huge,)), tmp_path / "out", tiny_base())
    assert not (tmp_path / "out").exists()


@needs_zstd
@pytest.mark.parametrize("granularity", ["entry", "block", "row", "column"])
@pytest.mark.parametrize("encoding", ["overwrite", "xor"])
def test_a_host_that_pulls_the_versions_has_the_merged_checkpoints_one_after_the_other(tmp_path, encoding, granularity):
    import zstandard

    state = saved_state(tiny_base().bfloat16(), tmp_path / "base")
    one = adapted(tiny_base().bfloat16(), granularity=granularity)
    two = adapted(tiny_base().bfloat16(), granularity=granularity, seed=9, target_modules=["q_proj", "up_proj"])
    first = hub.export_patch(one, tmp_path / "out", "slime", encoding=encoding)
    assert first.path.name == "weight_v000001"
    second = hub.export_patch(
        two, tmp_path / "out", "slime", base=tmp_path / "base", version=2, since=first.patch, encoding=encoding
    )
    with pytest.raises(ValueError, match="base_version"):
        pull_as_slime(state, 0, second.path, zstandard)
    after, version = pull_as_slime(state, 0, first.path, zstandard)
    assert equal(after, merged_state(one, tmp_path / "one"))
    assert pull_as_slime(after, version, first.path, zstandard)[0] is after
    after, version = pull_as_slime(after, version, second.path, zstandard)
    assert version == 2
    assert equal(after, merged_state(two, tmp_path / "two"))
    home = hub.write_slime_delta(hub.Patch(()), tmp_path / "out", tmp_path / "base", version=3, since=second.patch)
    assert equal(pull_as_slime(after, 2, home, zstandard)[0], state)


@needs_zstd
def test_slimes_directory_has_only_changed_tensors_and_its_index_names_all(tmp_path):
    base = tiny_base().bfloat16()
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    weights = [dict(base.named_parameters())[name].data for name in names]
    items = [
        hub.WeightPatch(
            name, tuple(w.shape), w.dtype, w.reshape(-1)[:1] + add, torch.tensor([0], dtype=torch.int32)
        )
        for name, w, add in zip(names, weights, (1.0, 0.0), strict=True)
    ]  # fmt: skip
    folder = hub.write_slime_delta(hub.Patch(tuple(items)), tmp_path, base)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {names[0]: "model-00000-of-00001.safetensors"}
    assert index["metadata"] == {
        "version": "000001", "base_version": "000000", "delta_encoding": "overwrite", "compression_format": "zstd",
        "checksum_format": "adler32",
    }  # fmt: skip
    assert {file.name for file in folder.iterdir()} == {
        "model-00000-of-00001.safetensors",
        "model.safetensors.index.json",
    }
    tensors = load_file(folder / "model-00000-of-00001.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {names[0]: torch.uint8}


@needs_zstd
@pytest.mark.parametrize("checksum", ["adler32", "xxh3-128", "blake3"])
def test_reading_a_delta_checks_versions_and_digests_before_it_gives_a_patch(tmp_path, checksum):
    if checksum != "adler32":
        pytest.importorskip({"xxh3-128": "xxhash", "blake3": "blake3"}[checksum])
    base = tiny_base().bfloat16()
    state = saved_state(base, tmp_path / "base")
    model = adapted(tiny_base().bfloat16())
    done = hub.export_patch(model, tmp_path / "out", "slime", checksum=checksum)
    back = hub.read_slime_delta(done.path, tmp_path / "base")
    assert equal(patched_state(state, back), merged_state(model, tmp_path / "merged"))
    with pytest.raises(ValueError, match="follows version 0, and the weights are at version 4"):
        hub.read_slime_delta(done.path, base, at_version=4)
    other = tiny.llama(seed=3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"in the patch|does not"):
        hub.read_slime_delta(done.path, other)
    shard = done.path / "model-00000-of-00001.safetensors"
    tensors = load_file(shard)
    import hashlib

    save_file(tensors, shard, metadata={name: hashlib.md5(bits(state[name])).hexdigest()[:8] for name in tensors})
    with pytest.raises(ValueError, match="checksum"):
        hub.read_slime_delta(done.path, base)
    index = done.path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"delta_encoding": "overwrite",', ""))
    with pytest.raises(ValueError, match="full checkpoint"):
        hub.read_slime_delta(done.path, base)


@needs_zstd
def test_a_digest_of_the_old_bytes_or_of_the_compressed_ones_is_refused(tmp_path):
    import zlib

    base = tiny_base().bfloat16()
    state = saved_state(base, tmp_path / "base")
    done = hub.export_patch(adapted(tiny_base().bfloat16()), tmp_path / "out", "slime")
    shard = done.path / "model-00000-of-00001.safetensors"
    tensors = load_file(shard)
    for wrong in ({n: bits(state[n]) for n in tensors}, {n: bits(t) for n, t in tensors.items()}):
        save_file(tensors, shard, metadata={n: f"{zlib.adler32(data):08x}" for n, data in wrong.items()})
        with pytest.raises(ValueError, match="does not give the bytes of its checksum"):
            hub.read_slime_delta(done.path, base)


def test_versions_and_words_that_are_none_are_refused_before_a_folder_appears(tmp_path):
    patch = hub.make_patch(adapted())
    for options, message in (
        ({"version": 0}, "version=0"),
        ({"version": 2}, "pass the patch"),
        ({"version": 1, "since": patch}, "leave since out"),
        ({"encoding": "diff"}, "encoding='diff'"),
        ({"checksum": "md5"}, "checksum='md5'"),
    ):
        with pytest.raises(ValueError, match=message):
            hub.write_slime_delta(patch, tmp_path / "out", tiny_base(), **options)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"package zstandard: pip install zstandard"):
        hub.export_patch(adapted(), tmp_path / "out", "slime")
    assert not (tmp_path / "out").exists()


def test_a_patch_shows_how_much_it_changes_and_not_its_numbers():
    weight = hub.WeightPatch("w", (4,), torch.bfloat16, torch.ones(2, dtype=torch.bfloat16), torch.tensor([0, 2]).int())
    assert repr(hub.Patch((weight,), {"w": "0" * 32}, 3)) == "Patch(1 tensors, 2 entries, 12 bytes, 3 unchanged)"


def test_one_bit_of_a_new_value_is_found_by_the_tensors_name(tmp_path):
    file = tmp_path / "p.safetensors"
    hub.write_patch(hub.make_patch(adapted()), file)
    tensors = load_file(file)
    content = file.read_bytes()
    for name in (key for key in tensors if key.endswith(":values")):
        at = content.index(bits(tensors[name]))
        file.write_bytes(content[: at + 1] + bytes([content[at + 1] ^ 1]) + content[at + 2 :])
        with pytest.raises(ValueError, match=f"'{name}' in .*checksum"):
            hub.read_patch(file)


@pytest.fixture
def delta(tmp_path):
    folder = hub.export_patch(adapted(), tmp_path / "out", "slime", base=tiny_base()).path
    assert hub.read_slime_delta(folder, tiny_base()).entries
    return folder


def reindex(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@needs_zstd
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].popitem(), "do not belong together"),
        (lambda i: i["weight_map"].clear(), "do not belong together"),
        (lambda i: i["weight_map"].update(x="../../secret.safetensors"), "no name of a file beside it"),
        (lambda i: i["weight_map"].update(x="/etc/passwd"), "no name of a file beside it"),
        (lambda i: i["weight_map"].update(x=3), "no name of a file beside it"),
        (lambda i: i.pop("weight_map"), "no index"), (lambda i: i.update(metadata=[]), "metadata"),
        (lambda i: i["metadata"].pop("checksum_format"), "checksum_format"),
        (lambda i: i["metadata"].update(base_version="x"), "'x', which is none"),
        (lambda i: i["metadata"].update(checksum_format=3), "checksum"),
    ],
)  # fmt: skip
def test_index_of_a_delta_that_lies_is_refused(delta, change, message):
    reindex(delta, change)
    with pytest.raises(ValueError, match=message):
        hub.read_slime_delta(delta, tiny_base())


@needs_zstd
def test_payload_that_unfolds_to_gigabytes_is_refused_before_it_does(delta):
    import zstandard

    (file,) = delta.glob("*.safetensors")
    names = list(load_file(file))
    for bomb in (
        zstandard.ZstdCompressor(level=1).compress(bytes(8 * 2**20)),
        zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(8 * 2**20)),
    ):
        save_file({name: torch.frombuffer(bytearray(bomb), dtype=torch.uint8) for name in names}, file)
        with pytest.raises(ValueError, match=r"q_proj\.weight' in .*damaged \((it unfolds to 8388608|decompr)"):
            hub.read_slime_delta(delta, tiny_base())
