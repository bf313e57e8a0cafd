"""What engines do with patches, written from their descriptions and sharing no code with the package."""

from __future__ import annotations

import copy
import json
import zlib
from typing import ClassVar
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from hf_sparse_peft import hub


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def saved_state(model, folder) -> dict[str, torch.Tensor]:
    """The tensors of a model's checkpoint files, by name."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def patched_state(state: dict[str, torch.Tensor], patch: hub.Patch) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors with a patch written entry by entry."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    for name, shape, dtype, values, indices in patch.weights:
        assert (tuple(state[name].shape), state[name].dtype) == (shape, dtype)
        flat = state[name].view(-1)
        for at, value in zip(range(flat.numel()) if indices is None else indices.tolist(), values, strict=True):
            flat[at] = value
    return state


def merged_state(model, folder, dtype=None, **options) -> dict[str, torch.Tensor]:
    return saved_state(hub.merge_to_dense(model, dtype=dtype, **options), folder)


class PackedServer(nn.Module):
    """A server's layer: q, k, v and gate, up packed along rows, biases, and a head that is the embedding."""

    PACKED: ClassVar[dict] = {"qkv": ("q_proj", "k_proj", "v_proj"), "gate_up": ("gate_proj", "up_proj")}

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names, self.tensors = {}, nn.ParameterDict()
        self.load(state, allocate=True)

    def _place(self, name: str) -> tuple[str, str | None]:
        for packed, parts in self.PACKED.items():
            for part in parts:
                if f".{part}." in name:
                    return name.replace(f".{part}.", f".{packed}.").replace(".", "/"), part
        return name.replace(".", "/"), None

    def load(self, tensors: dict[str, torch.Tensor], allocate: bool = False) -> None:
        """The loader: every write is one `copy_` into a part of a packed parameter."""
        if allocate:
            rows: dict[str, list[tuple[str, torch.Tensor]]] = {}
            for name in sorted(tensors, key=self._order):
                rows.setdefault(self._place(name)[0], []).append((name, tensors[name]))
            for key, parts in rows.items():
                start = 0
                for name, tensor in parts:
                    self.names[name] = (key, start, start + tensor.shape[0])
                    start += tensor.shape[0]
                self.tensors[key] = nn.Parameter(torch.cat([torch.zeros_like(t) for _, t in parts]), False)
        for name, tensor in tensors.items():
            key, start, stop = self.names[name]
            self.tensors[key].data[start:stop].copy_(tensor)

    def _order(self, name: str) -> int:
        part = self._place(name)[1]
        return 0 if part is None else ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"].index(part)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: self.tensors[key].data[a:b].clone() for name, (key, a, b) in self.names.items()}


def load_as_vllm(server: PackedServer, patches: list) -> None:
    """One call of a loader that copies where a tensor full of NaN was written, all checks before the first write."""
    sparse = {patch.indices is not None for patch in patches}
    if len(sparse) > 1:
        raise ValueError("mixed dense and sparse")
    for patch in patches:
        numel = int(np.prod(patch.shape))
        if torch.isnan(patch.values.float()).any():
            raise ValueError("NaN")
        if patch.indices is not None:
            listed = patch.indices.tolist()
            if len(set(listed)) != len(listed) or any(not 0 <= i < numel for i in listed):
                raise ValueError("indices")
    original = torch.Tensor.copy_

    def copy_known(self, source, *args, **kwargs):
        return original(self, torch.where(torch.isnan(source), self, source), *args, **kwargs)

    for patch in patches:
        if patch.indices is None:
            server.load({patch.name: patch.values.view(patch.shape)})
            continue
        dense = torch.full((int(np.prod(patch.shape)),), float("nan"), dtype=patch.dtype)
        dense.index_copy_(0, patch.indices.long(), patch.values.to(patch.dtype))
        with mock.patch.object(torch.Tensor, "copy_", copy_known):
            server.load({patch.name: dense.view(patch.shape)})


def pull_as_slime(state: dict[str, torch.Tensor], version: int, folder, zstd) -> tuple[dict[str, torch.Tensor], int]:
    """A host that pulls one delta directory into its copy of the checkpoint; digests are compared after writing."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    about = index["metadata"]
    if int(about["version"]) == version:
        return state, version
    if int(about["base_version"]) != version:
        raise ValueError("base_version")
    state = copy.deepcopy(state)
    for name, file_name in index["weight_map"].items():
        with safe_open(folder / file_name, framework="np") as file:
            payload, expected = file.get_tensor(name).tobytes(), file.metadata()[name]
        data = np.frombuffer(bytearray(bits(state[name])), dtype=np.uint8)
        delta = zstd.ZstdDecompressor().decompress(payload)
        if about["delta_encoding"] == "xor":
            data ^= np.frombuffer(delta, dtype=np.uint8)
        else:
            count = int.from_bytes(delta[:4], "little")
            at = np.frombuffer(delta, dtype="<u4", count=count, offset=4)
            data[at] = np.frombuffer(delta, dtype=np.uint8, offset=4 + 4 * count)
        if about["checksum_format"] == "adler32" and f"{zlib.adler32(data.tobytes()):08x}" != expected:
            raise ValueError("checksum")
        state[name] = torch.frombuffer(data, dtype=torch.uint8).view(state[name].dtype).view(state[name].shape)
    return state, int(about["version"])
