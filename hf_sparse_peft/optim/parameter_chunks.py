"""Parameters in pieces: a direction is drawn, masked and added one chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..sparsity import top_units

# Numbers of a direction alive at once. Part of the draw: another size gives another direction.
_CPU_CHUNK, _ACCELERATOR_CHUNK = 1 << 20, 1 << 24


def magnitude_threshold(parameter: Tensor, fraction: float, name: str = "") -> Tensor:
    r"""The :math:`h` with a `fraction` of all :math:`|\theta| \le h`: the
    `round(fraction * numel)`-th smallest magnitude.

    Returns a 0-dim tensor in the parameter's dtype, so that a checkpoint's cast changes nothing.

    Raises:
        ValueError: `h` is 0, as in a parameter that starts at zero: its entries would freeze as soon as they moved.
    """
    flat = parameter.reshape(-1)
    count = max(1, round(fraction * flat.numel()))
    pieces = lambda: (piece.abs() for piece in flat.split(_CPU_CHUNK))  # noqa: E731
    threshold = flat[top_units(pieces, count, largest=False).long()].abs().max()
    if threshold == 0:
        raise ValueError(
            f"sparsity={1 - fraction:g} gives '{name}' a threshold of 0: so much of it is zero, as in a new adapter, "
            "and an entry would freeze as soon as it moved. Choose the support instead (methods.get('sparse-mezo')), "
            "set sparsity=0, or do not train this parameter."
        )
    return threshold


def chunks(parameter: Tensor) -> Iterator[Tensor]:
    """Views of a parameter, as many numbers at once as a direction is drawn for."""
    numel = _CPU_CHUNK if parameter.device.type == "cpu" else _ACCELERATOR_CHUNK
    if parameter.is_contiguous() or parameter.ndim == 0:
        yield from parameter.view(-1).split(numel)
    else:
        yield from parameter.split(max(1, numel * parameter.shape[0] // max(1, parameter.numel())))


def add_rounded_once(piece: Tensor, z: Tensor, amount: float, shrink: float = 0.0, mask: Tensor | None = None) -> None:
    """`piece <- piece - shrink * mask * piece + amount * z` in z's dtype, rounded once; `z` may be used up."""
    wide = piece if piece.dtype == z.dtype else piece.to(z.dtype)
    if shrink:
        wide.mul_(1 - shrink if mask is None else 1 - shrink * mask.to(z.dtype))
    wide.add_(z, alpha=amount)
    if wide is not piece:
        piece.copy_(wide)
