"""Delta directories as slime writes and SGLang pulls them: changed bytes of a checkpoint's tensors, version on version.

    weight_v000001/model-00000-of-00001.safetensors    per changed tensor: zstd of its changed bytes, and a checksum of
                   model.safetensors.index.json        its new bytes; versions, encoding, compression, file of each

Bytes are compared, so every dtype goes. Version 0 is the checkpoint itself.
"""

from __future__ import annotations

import importlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...utils.checkpoint_index import read_index
from ...utils.checksums import raw_bytes
from ...utils.file_writing import whole_file
from ..folders import staged_folder
from .base_values import BaseTensor, base_tensors
from .weight_patch import Patch, digest, weight_patch

Encoding = Literal["overwrite", "xor"]
Checksum = Literal["xxh3-128", "blake3", "adler32"]
_SHARD_BYTES = 4 * 2**30


def write_slime_delta(
    patch: Patch,
    path: str | os.PathLike,
    base: nn.Module | str | os.PathLike,
    *,
    version: int = 1,
    since: Patch | None = None,
    encoding: Encoding = "overwrite",
    checksum: Checksum = "adler32",
) -> Path:
    """Write the directory `weight_v{version:06d}` into the folder `path`; returns it.

    It takes a server from version - 1, which is `base` with the patch `since` (None: without one), to `base` with
    `patch`; tensors that do not change are left out. Whole or not at all.

    Args:
        patch: what the server is to have.
        path: the folder of all versions.
        base: the checkpoint that is version 0, its folder or a plain model.
        version: 1 or more.
        since: the patch that version - 1 has.
        encoding: "overwrite" may be applied twice, "xor" takes itself back when it is.
        checksum: of the tensors' new bytes; xxh3-128 and blake3 need the packages xxhash and blake3.

    Raises:
        ValueError: the directory exists, a package is missing, a tensor is 4 GiB or larger and encoding is
            "overwrite", whose positions have 32 bits, or `base` lacks a tensor.
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version={version!r} must be an integer >= 1; version 0 is the checkpoint itself.")
    if version == 1 and since is not None:
        raise ValueError("version=1 follows the checkpoint itself, which has no patch; leave since out.")
    if version > 1 and since is None:
        raise ValueError(f"version={version} follows version {version - 1}; pass the patch that one has as since=.")
    if encoding not in ("overwrite", "xor"):
        raise ValueError(f"encoding={encoding!r} is unknown; choose 'overwrite' or 'xor'.")
    sum_of, compress = _checksum(checksum), _zstd().ZstdCompressor(level=1).compress
    items = {one.name: one for one in (*(since.weights if since else ()), *patch.weights)}
    for item in items.values():
        check_size(item.name, item.numel * item.dtype.itemsize, encoding)
    payloads, sums = {}, {}
    for name, before, after in _states(patch, since, base_tensors(base)):
        old, new = raw_bytes(before), raw_bytes(after)
        if torch.equal(old, new):
            continue
        payloads[name] = compress(encode_delta(old, new, encoding, name))
        sums[name] = sum_of(new.numpy())
    folder = Path(path) / f"weight_v{version:06d}"
    metadata = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": encoding,
        "compression_format": "zstd",
        "checksum_format": checksum,
    }
    with staged_folder(folder) as stage:
        _write_files(stage, payloads, sums, metadata)
    return folder


def read_slime_delta(
    folder: str | os.PathLike,
    base: nn.Module | str | os.PathLike,
    *,
    at_version: int = 0,
    since: Patch | None = None,
) -> Patch:
    """The patch that takes a server from `at_version`, which is `base` with `since`, to what the directory holds:
    values of all entries that differ from the server's, checked against the checksums.

    Raises:
        ValueError: the directory follows another version or is no delta, a tensor is damaged, or its checksum is not
            that of the new bytes, as on another base; names the tensor.
    """
    folder = Path(folder)
    where, about = read_index(folder / "model.safetensors.index.json")
    _check_about(about, folder, at_version)
    sum_of, encoding = _checksum(about["checksum_format"]), about["delta_encoding"]
    _check_complete(where, folder)
    stored, present = base_tensors(base), {one.name: one for one in (since.weights if since else ())}
    items, digests = [], {}
    for name, file_name in where.items():
        try:
            with safe_open(folder / file_name, framework="pt") as file:
                payload, expected = file.get_tensor(name), (file.metadata() or {}).get(name)
        except (SafetensorError, OSError, TypeError, RuntimeError) as error:
            raise ValueError(f"'{name}' in '{folder}' cannot be read ({error}).") from error
        if payload.dtype != torch.uint8 or payload.ndim != 1:
            raise ValueError(f"'{name}' in '{folder}' is {payload.dtype} of {payload.ndim} axes: it is no delta.")
        before = _patched(stored(name), present.get(name))
        old = raw_bytes(before)
        # No delta of a tensor is longer, whatever the payload says that it unfolds to.
        longest = old.numel() if encoding == "xor" else 4 + 5 * old.numel()
        new = decode_delta(old, _unfolded(payload.numpy().tobytes(), longest, name, folder), encoding, name)
        if sum_of(new.numpy()) != expected:
            raise ValueError(
                f"'{name}' in '{folder}' does not give the bytes of its checksum: it is damaged, or it was made "
                "against other weights. Nothing was changed."
            )
        width = before.element_size()
        at = (old.view(-1, width) != new.view(-1, width)).any(dim=1).nonzero().view(-1)
        after = new.view(before.dtype)
        items.append(weight_patch(name, tuple(before.shape), after[at], at))
        digests[name] = digest(before.reshape(-1)[at])
    return Patch(tuple(items), digests)


def _check_about(about: dict[str, Any], folder: Path, at_version: int) -> None:
    """Refuse a directory that is no delta, or follows another version."""
    if "delta_encoding" not in about:
        raise ValueError(f"'{folder}' has no delta_encoding: it is a full checkpoint; load it as one.")
    missing = [key for key in ("base_version", "compression_format", "checksum_format") if key not in about]
    if missing:
        raise ValueError(f"'{folder}' has no {missing[0]} in its index; it is damaged. Copy it again.")
    version = str(about["base_version"])[:20]
    version = int(version) if version.isdecimal() else f"{version!r}, which is none"
    if version != at_version:
        raise ValueError(
            f"'{folder}' follows version {version}, and the weights are at version {at_version}; apply the versions "
            "between first."
        )
    if about["compression_format"] != "zstd":
        raise ValueError(f"compression_format={about['compression_format']!r} is unknown; zstd is.")


def _check_complete(where: dict[str, str], folder: Path) -> None:
    """Refuse an index that leaves out a file, or a tensor of one."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), file.name)
        except SafetensorError as error:
            raise ValueError(f"'{file}' cannot be read ({error}).") from error
    odd = sorted(name for name in {**found, **where} if found.get(name) != where.get(name))
    if odd:
        raise ValueError(
            f"'{odd[0]}' is in {found.get(odd[0])} in '{folder}', and in {where.get(odd[0])} by its index: they do not "
            "belong together. Copy the directory again."
        )


def _unfolded(payload: bytes, longest: int, name: str, folder: Path) -> bytes:
    """A payload without its compression, of at most `longest` bytes.

    Raises:
        ValueError: it is no zstd frame, or unfolds to more; names the tensor.
    """
    zstd = _zstd()
    try:
        size = zstd.frame_content_size(payload)
        if size > longest:
            raise ValueError(f"it unfolds to {size} bytes, and a delta of it has {longest} at most")
        return zstd.ZstdDecompressor().decompress(payload, max_output_size=longest)
    except (ValueError, zstd.ZstdError) as error:
        raise ValueError(f"'{name}' in '{folder}' is damaged ({error}).") from error


def encode_delta(old: Tensor, new: Tensor, encoding: Encoding, name: str = "tensor") -> bytes:
    """Changed bytes of a tensor, before compression, from its old and new bytes (uint8 `[n]`).

    "xor": `new ^ old`, n bytes. "overwrite": their number as u32, their positions as u32, ascending, and the new bytes,
    little-endian.

    Raises:
        ValueError: "overwrite", and a position would not fit 32 bits; names the tensor.
    """
    check_size(name, old.numel(), encoding)
    if encoding == "xor":
        return (old ^ new).numpy().tobytes()
    at = (old != new).nonzero().view(-1)
    return struct.pack("<I", at.numel()) + at.numpy().astype("<u4").tobytes() + new[at].numpy().tobytes()


def decode_delta(old: Tensor, payload: bytes, encoding: str, name: str = "tensor") -> Tensor:
    """The new bytes; `old` is left as it is.

    Raises:
        ValueError: the encoding is unknown, or the payload does not fit the tensor; names it.
    """
    damaged = ValueError(f"The delta of '{name}' does not fit a tensor of {old.numel()} bytes; it is damaged.")
    if encoding == "xor":
        if len(payload) != old.numel():
            raise damaged
        return old ^ torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else old.clone()
    if encoding != "overwrite":
        raise ValueError(f"delta_encoding={encoding!r} of '{name}' is unknown; 'overwrite' and 'xor' are.")
    count = struct.unpack_from("<I", payload)[0] if len(payload) >= 4 else -1
    if len(payload) != 4 + 5 * count:
        raise damaged
    new = old.clone()
    if count:
        at = torch.frombuffer(bytearray(payload[4 : 4 + 4 * count]), dtype=torch.uint8).view(torch.uint32).long()
        if int(at.max()) >= old.numel() or bool((at[1:] <= at[:-1]).any()):
            raise damaged
        new[at] = torch.frombuffer(bytearray(payload[4 + 4 * count :]), dtype=torch.uint8)
    return new


def check_size(name: str, size: int, encoding: str) -> None:
    """Refuse a tensor of `size` bytes whose byte positions do not fit 32 bits.

    Raises:
        ValueError: names it.
    """
    if encoding == "overwrite" and size >= 2**32:
        raise ValueError(
            f"'{name}' has {size:,} bytes, and encoding='overwrite' has positions of 32 bits: 4 GiB and more overflow. "
            "Use encoding='xor' or format='vllm'."
        )


def _states(patch: Patch, since: Patch | None, stored: BaseTensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each touched tensor before and after."""
    before = {one.name: one for one in (since.weights if since else ())}
    after = {one.name: one for one in patch.weights}
    for name in {**before, **after}:
        base, served = stored(name), (after.get(name) or before[name]).dtype
        yield name, _patched(base.to(served), before.get(name)), _patched(base.to(served), after.get(name))


def _patched(base: Tensor, item: Any) -> Tensor:
    if item is None:
        return base
    if tuple(base.shape) != item.shape:
        raise ValueError(f"'{item.name}' is {tuple(base.shape)} in the base and {item.shape} in the patch.")
    flat = base.to(item.dtype, copy=True).reshape(-1)
    flat[slice(None) if item.indices is None else item.indices.long()] = item.values
    return flat.view(base.shape)


def _write_files(stage: Path, payloads: dict[str, bytes], sums: dict[str, str], metadata: dict[str, str]) -> None:
    shards: list[list[str]] = [[]]
    size = 0
    for name, payload in payloads.items():
        if shards[-1] and size + len(payload) > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += len(payload)
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.frombuffer(bytearray(payloads[name]), dtype=torch.uint8) for name in names}
        with whole_file(stage / file_name) as file:
            save_file(tensors, file, metadata={name: sums[name] for name in names})
        weight_map |= dict.fromkeys(names, file_name)
    with whole_file(stage / "model.safetensors.index.json") as file:
        file.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2), encoding="utf-8")


def _checksum(name: str) -> Callable[[Any], str]:
    if name == "adler32":
        return lambda data: f"{zlib.adler32(data):08x}"
    if name == "xxh3-128":
        return _package("xxhash").xxh3_128_hexdigest
    if name == "blake3":
        blake3 = _package("blake3").blake3
        return lambda data: blake3(data).hexdigest()
    raise ValueError(f"checksum={name!r} is unknown; choose 'adler32', 'xxh3-128' or 'blake3'.")


def _zstd() -> Any:
    return _package("zstandard")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"Delta directories of slime need the package {name}: pip install {name}.") from error
