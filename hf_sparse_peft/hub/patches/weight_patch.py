"""`Patch`: new values of some entries of a checkpoint, by tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...utils.checksums import raw_bytes


class WeightPatch(NamedTuple):
    """New values of one checkpoint tensor; the fields of vLLM's `CheckpointWeightPatch`, in its order."""

    name: str
    """Name of the tensor in the checkpoint's files."""
    shape: tuple[int, ...]
    """Its full shape there."""
    dtype: torch.dtype
    """Its dtype there."""
    values: Tensor
    """`[n]` of `dtype`, contiguous: the new values themselves, not differences."""
    indices: Tensor | None
    """`[n]` flat row-major positions in `shape`, strictly increasing; int32, int64 for tensors of 2**31 entries or
    more. None: the whole tensor is replaced, n is its number of entries."""

    @property
    def numel(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Patch:
    """Changes of a checkpoint.

    Raises:
        ValueError: a name is empty or comes twice; values are not `[n]` of the tensor's dtype, or NaN; indices are not
            strictly increasing integers within the tensor, or not as many as the values. Names the tensor.
    """

    weights: tuple[WeightPatch, ...]
    """One item a tensor."""
    base_digests: Mapping[str, str] = field(default_factory=dict)
    """Digest of the values that each item replaces, by tensor name: applying checks those that are there."""
    unchanged: int = 0
    """Entries of the adapter that were left out, because rounding gives them the base's own value."""

    def __post_init__(self) -> None:
        names = set()
        for weight in self.weights:
            _check(weight)
            if weight.name in names:
                raise ValueError(f"'{weight.name}' comes twice in the patch; put all of its entries into one item.")
            names.add(weight.name)

    def __repr__(self) -> str:
        """How much it changes; not the numbers themselves."""
        return (
            f"Patch({len(self.weights)} tensors, {self.entries} entries, {self.payload_bytes} bytes, "
            f"{self.unchanged} unchanged)"
        )

    @property
    def entries(self) -> int:
        """Values in all tensors."""
        return sum(weight.values.numel() for weight in self.weights)

    @property
    def payload_bytes(self) -> int:
        """Bytes of values and indices as an engine gets them."""
        tensors = [t for w in self.weights for t in (w.values, w.indices) if t is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_patch(name: str, shape: tuple[int, ...], values: Tensor, indices: Tensor | None) -> WeightPatch:
    """An item of a patch from values and sorted positions of any strides and integer dtype, moved to the CPU."""
    if indices is not None:
        indices = indices.to("cpu", torch.int32 if math.prod(shape) < 2**31 else torch.int64).contiguous()
    return WeightPatch(name, tuple(shape), values.dtype, values.detach().cpu().contiguous(), indices)


def to_vllm_patches(patch: Patch, chunk_bytes: int = 512 * 2**20) -> Iterator[list[WeightPatch]]:
    """The items of `patch` in lists for one call of vLLM's `load_checkpoint_weight_patches` each.

    A list has sparse items only or dense items only, which one call may not mix, and tensors of at most `chunk_bytes`
    together, because vLLM unfolds an item to its whole tensor; a larger tensor is a list of its own. vLLM's own class
    is made of an item by `CheckpointWeightPatch(*item)`.

    Raises:
        ValueError: a sparse item is not floating-point (NaN marks what stays), or `chunk_bytes` is no size.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes={chunk_bytes} is no size; give bytes, such as {512 * 2**20}.")
    for weight in patch.weights:
        if weight.indices is not None and not weight.dtype.is_floating_point:
            raise ValueError(
                f"'{weight.name}' is {weight.dtype}, and vLLM takes sparse patches of floating-point tensors only: NaN "
                "marks what stays. Send the whole tensor, or use format='slime', which compares bytes."
            )
    for sparse in (True, False):
        chunk, size = [], 0
        for weight in (w for w in patch.weights if (w.indices is not None) == sparse):
            own = weight.numel * weight.dtype.itemsize
            if chunk and size + own > chunk_bytes:
                yield chunk
                chunk, size = [], 0
            chunk.append(weight)
            size += own
        if chunk:
            yield chunk


def digest(values: Tensor) -> str:
    """A digest of a tensor's bytes in row-major order."""
    return hashlib.blake2b(raw_bytes(values).numpy(), digest_size=16).hexdigest()


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Where two `[n]` tensors of one dtype differ in a bit."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return raw_bytes(one).view(integers) != raw_bytes(other).view(integers)


def has_nan(values: Tensor) -> bool:
    """Whether a value is NaN, for all dtypes."""
    if not values.dtype.is_floating_point:
        return False
    return bool(torch.isnan(values if values.element_size() > 1 else values.float()).any())


def _check(weight: WeightPatch) -> None:
    name, _, dtype, values, indices = weight
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r} of a weight patch is no tensor name; give that of the checkpoint's file.")
    if values.ndim != 1 or values.dtype != dtype:
        raise ValueError(
            f"The values of '{name}' are {values.dtype} of shape {tuple(values.shape)}; they must be [n] of {dtype}."
        )
    if has_nan(values):
        raise ValueError(f"The values of '{name}' have a NaN, which engines take for 'unchanged'.")
    if indices is None:
        if values.numel() != weight.numel:
            raise ValueError(f"'{name}' has {weight.numel} entries, and the patch replaces it by {values.numel()}.")
        return
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64) or indices.numel() != values.numel():
        raise ValueError(
            f"The indices of '{name}' are {indices.dtype} of shape {tuple(indices.shape)}; they must be int32 or int64 "
            f"of shape [{values.numel()}], one for each value."
        )
    if not indices.numel():
        return
    if int(indices[0]) < 0 or int(indices[-1]) >= weight.numel:
        raise ValueError(
            f"An index of '{name}' is out of range: {int(indices[0])} to {int(indices[-1])} in a tensor of "
            f"{weight.numel} entries."
        )
    if bool((indices[1:] <= indices[:-1]).any()):
        raise ValueError(f"The indices of '{name}' are not strictly increasing; sort them, and let each come once.")
