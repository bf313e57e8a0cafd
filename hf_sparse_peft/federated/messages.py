"""What travels between server and clients: safetensors with checksums, as bytes, read whole or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..utils.checksums import checked_bytes
from ..utils.file_length import read_safetensors_bytes
from ..utils.json_text import read_json_text
from ..utils.option_types import check_value

_ABOUT = "federated"


@dataclass(frozen=True)
class Message:
    """A message that was read."""

    kind: str
    """What it is: "adapter", "feddip", "ferret"."""
    about: dict[str, Any]
    """What its sender says of it; JSON."""
    tensors: dict[str, Tensor]
    """By name, on the CPU."""
    size: int
    """Bytes on the wire."""

    def get(self, name: str, accepted: Any, sender: str) -> Any:
        """What it says of `name`; raises `ValueError` where that is none of `accepted` (a type or `Range`)."""
        check_value(self.about.get(name), accepted, f"the message of '{sender}': {name}")
        return self.about[name]


def pack(kind: str, tensors: Mapping[str, Tensor], **about: Any) -> bytes:
    """The bytes of a message: the tensors in their own dtypes, 8 hexadecimal digits of checksum for each, and `about`
    as JSON.

    Raises:
        TypeError: `about` is not JSON.
        ValueError: a tensor is not finite.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(held, "this message")
    return checked_bytes(held, {_ABOUT: json.dumps({"kind": kind, **about}, sort_keys=True, allow_nan=False)})


def unpack(data: bytes, sender: str, kind: str | None = None) -> Message:
    """A message of `sender`, of that kind, checked.

    Raises:
        ValueError: it is cut, damaged, of another kind, or a number in it is not finite; names sender and tensor.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ValueError(f"The message of '{sender}' is a {type(data).__name__}, not bytes.")
    tensors, metadata = read_safetensors_bytes(data, f"the message of {sender}")
    try:
        about = read_json_text(metadata.get(_ABOUT, ""))
        found = about.pop("kind")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"The message of '{sender}' does not say what it is: {error}. Have it sent again.") from error
    if kind is not None and found != kind:
        raise ValueError(f"The message of '{sender}' is of kind {found!r}, and {kind!r} is awaited.")
    check_finite(tensors, sender)
    return Message(found, about, tensors, len(data))


def pack_all(messages: Sequence[bytes]) -> bytes:
    """Several messages as one, for who has missed some; `unpack_all` takes them apart."""
    held = {f"{at:06d}": torch.frombuffer(bytearray(one), dtype=torch.uint8) for at, one in enumerate(messages)}
    return pack("several", held)


def unpack_all(data: bytes, sender: str) -> list[bytes]:
    """The messages that `pack_all` put together, in their order; raises as `unpack`."""
    tensors = unpack(data, sender, "several").tensors
    for name, tensor in tensors.items():
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise ValueError(
                f"'{name}' of '{sender}' is {tensor.dtype} of shape {tuple(tensor.shape)}, and no message, a row of "
                "torch.uint8. Have it sent again."
            )
    return [bytes(tensors[name].numpy()) for name in sorted(tensors)]


def check_finite(tensors: Mapping[str, Tensor], sender: str) -> None:
    """Raises `ValueError`, naming sender and tensor, where a number is NaN or infinite."""
    for name, tensor in tensors.items():
        finite = torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor)  # not of 8-bit floats
        if tensor.is_floating_point() and not bool(finite.all()):
            count = int((~finite).sum())
            raise ValueError(
                f"'{name}' of '{sender}' has {count} numbers of {tensor.numel()} that are NaN or infinite. Lower the "
                "client's learning rate, or clip its gradients."
            )


def check_tensors_like(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor], sender: str) -> None:
    """Raises `ValueError`, naming sender and tensor, unless names, shapes and dtypes are those of `known`."""
    odd = sorted(set(tensors) ^ set(known))
    if odd:
        what = "is missing from" if odd[0] in known else "is not awaited, and in"
        raise ValueError(f"'{odd[0]}' {what} the message of '{sender}'. All take part with one config and one base.")
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (known[name].shape, known[name].dtype):
            raise ValueError(
                f"'{name}' of '{sender}' is {tensor.dtype} of shape {tuple(tensor.shape)}, and the server's is "
                f"{known[name].dtype} of {tuple(known[name].shape)}. All take part with one config and one base."
            )
