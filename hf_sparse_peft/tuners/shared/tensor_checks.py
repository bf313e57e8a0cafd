"""Tensors that come from outside, checked against the specs of the adapter that they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from ...utils.tensors import TensorSpec

_PIECE = 2**18
"""Numbers that are looked at together."""
_UNLIKELY_SIDES = (2**31 - 1, 2**31 - 99)
"""Rows and columns of a weight that is never allocated: a spec that has one of them has that side of the weight."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def check_module(
    held: Mapping[str, torch.Tensor],
    specs: Iterable[TensorSpec],
    key_of: Callable[[str], str],
    source: Path | str,
) -> None:
    """Check the tensors `held` of one module, by name: which there are, their shapes, dtypes and contents.

    `key_of` gives a tensor's key in `source`, which errors name.

    Raises:
        ValueError: a tensor is missing, surplus, of another dtype or shape, not finite, or fails its spec's own check.
    """
    specs = list(specs)
    check_shapes(held, specs, key_of, source)
    for spec in specs:
        tensor, key = held[spec.name], key_of(spec.name)
        check_numbers(tensor, key, source, trained=spec.role == "trained")
        if spec.check is not None:
            spec.check(tensor, key)
        if tensor.dtype != spec.dtype and not (tensor.is_floating_point() and spec.dtype.is_floating_point):
            raise ValueError(f"'{key}' in '{source}' is {tensor.dtype}; it takes {spec.dtype}. Save the adapter again.")


def check_shapes(
    held: Mapping[str, torch.Tensor],
    specs: Iterable[TensorSpec],
    key_of: Callable[[str], str],
    source: Path | str,
) -> None:
    """Check which tensors there are, and their shapes.

    Raises:
        ValueError: a tensor is missing, surplus or of another shape; names it.
    """
    specs = list(specs)
    for spec in specs:
        key = key_of(spec.name)
        if spec.name not in held:
            raise ValueError(
                f"'{key}' is missing from '{source}'; the file is incomplete, or its config asks for other tensors or "
                "modules than it was saved with."
            )
        if tuple(held[spec.name].shape) != spec.shape:
            raise ValueError(
                f"'{key}' in '{source}' has shape {tuple(held[spec.name].shape)}, and its config makes it {spec.shape} "
                "here. The file is truncated or belongs to another base model or config."
            )
    surplus = sorted(set(held) - {spec.name for spec in specs})
    if surplus:
        raise ValueError(
            f"'{key_of(surplus[0])}' in '{source}' has no place in the layer that its config makes. Use the config "
            "saved with the file."
        )


def check_numbers(tensor: torch.Tensor, key: str, source: Path | str, *, trained: bool) -> None:
    """Refuse dtypes that no adapter is saved in, and numbers that are not finite.

    Raises:
        ValueError: names the tensor.
    """
    accepted = _FLOATS if trained else (*_FLOATS, *_INTEGERS)
    if tensor.dtype not in accepted:
        kind = "one of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        raise ValueError(f"'{key}' in '{source}' is {tensor.dtype}; it takes {kind}. Save the adapter again.")
    wide = trained and tensor.dtype == torch.float64  # masters are fp32
    pieces = tensor.reshape(-1).split(_PIECE) if tensor.is_floating_point() else ()  # `isfinite` makes a copy
    if not all(torch.isfinite(piece.float() if wide else piece).all() for piece in pieces):
        raise ValueError(f"'{key}' in '{source}' has values that are not finite; the adapter is damaged.")


def weight_sides(
    specs_of: Callable[[int, int], Iterable[TensorSpec]], held: Mapping[str, torch.Tensor]
) -> tuple[int, int]:
    """Rows and columns of a module's weight, read off its tensors `held`; 0 where no tensor has that side.

    `specs_of(rows, cols)` are the specs on a weight of that shape. Whether all tensors agree is left to `check_shapes`.
    """
    rows, cols = _UNLIKELY_SIDES
    found = {rows: 0, cols: 0}
    for spec in specs_of(rows, cols):
        shape = tuple(held[spec.name].shape) if spec.name in held else ()
        for at, length in enumerate(spec.shape):
            if length in found and at < len(shape):
                found[length] = found[length] or shape[at]
    return found[rows], found[cols]


def side(held: Mapping[str, torch.Tensor], name: str, axis: int, ndim: int, key: str) -> int:
    """Length of `axis` of the tensor `name`, from which the size of a module's weight is read.

    Raises:
        ValueError: there is no such tensor, it does not have `ndim` axes, or that one is empty.
    """
    if name not in held:
        raise ValueError(f"'{key}' is missing; the file is incomplete, or its config asks for other tensors.")
    shape = tuple(held[name].shape)
    if len(shape) != ndim or not shape[axis]:
        raise ValueError(f"'{key}' has shape {shape}; it takes {ndim} axes, none of them empty.")
    return shape[axis]
