r"""Random bases that sender and receiver draw from the same seed: coordinates of a vector in them, and back.

A base of d numbers is :math:`v = u / \sqrt d` with `ops.seeded_uniform`'s u in [-1, 1): :math:`|v_i| \le 1/\sqrt d` and
:math:`E[v v^\top] = I / (3d)`. Ferret draws normal numbers that are cut off at the same bounds, where the density of
their standard normal changes by a factor of at most :math:`e^{1/(2d)}`: uniform ones but for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.seeded import seeded_permutation, seeded_uniform
from ..sparsity import stream_seed

VARIANCE = 1 / 3
"""Of a base's numbers, times d."""
_CHUNK = 1 << 22
LONGEST = 1 << 32
"""Numbers of a block: so many positions have hashes of their own."""


@dataclass(frozen=True)
class Block:
    """Tensors that are projected together."""

    names: tuple[str, ...]
    size: int
    """Numbers in all."""

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """fp32 `[size]`."""
        return torch.cat([tensors[name].detach().float().flatten() for name in self.names])

    def unflatten(self, flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """fp32 tensors of the shapes that `like` has."""
        parts = flat.split([like[name].numel() for name in self.names])
        return {name: part.view(like[name].shape) for name, part in zip(self.names, parts, strict=True)}


def blocks_of(tensors: Mapping[str, Tensor], share: float = 0.9) -> list[Block]:
    """Blocks of the tensors in their order, packed greedily: one ends where the next tensor would bring it above
    `int(share * median)` of the tensors' sizes; a larger tensor is a block of its own.

    Raises:
        ValueError: no tensor, or a block of 2**32 numbers or more.
    """
    if not tensors:
        raise ValueError("There is no tensor to project: nothing trains.")
    sizes = torch.tensor([float(tensor.numel()) for tensor in tensors.values()], dtype=torch.float64)
    most = int(share * float(sizes.quantile(0.5)))  # the mean of the middle two of an even number
    found: list[Block] = []
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        if names and held + tensor.numel() > most:
            found.append(Block(tuple(names), held))
            names, held = [], 0
        names.append(name)
        held += tensor.numel()
    found.append(Block(tuple(names), held))
    for block in found:
        if block.size >= LONGEST:
            raise ValueError(
                f"'{block.names[0]}' makes a block of {block.size} numbers, and {LONGEST - 1} is the most."
            )
    return found


def base(
    seed: int, block: int, number: int, size: int, device: torch.device | str | None = None, count: int = 1
) -> Tensor:
    """v `[count, size]`, fp32: the bases `number`, `number + 1`, ... of block `block`; the same bits on every device.

    As many of them share a seed as have positions of their own; `count` may not go beyond.
    """
    page, place = divmod(number, (LONGEST - 1) // size)
    drawn = seeded_uniform(stream_seed(seed, block, page), count, size, start=place * size, device=device)
    return drawn.mul_(size**-0.5)


def bases(
    seed: int, block: int, numbers: Sequence[int], size: int, device: torch.device | str | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """Places in the sorted `numbers`, and their bases `[k, size]`, a few at a time."""
    step, per_page = max(1, _CHUNK // size), (LONGEST - 1) // size
    for first in range(0, len(numbers), step):
        some, made, at = numbers[first : first + step], [], 0
        while at < len(some):
            run = 1
            while at + run < len(some) and some[at + run] == some[at] + run and (some[at] + run) % per_page:
                run += 1
            made.append(base(seed, block, some[at], size, device, run))
            at += run
        yield slice(first, first + len(some)), made[0] if len(made) == 1 else torch.cat(made)


def chosen_bases(seed: int | None, block: int, candidates: int, count: int) -> list[int]:
    """`count` of the numbers 0, ..., `candidates - 1`, sorted: the first ones, or with a seed of the sender any."""
    if seed is None:
        return list(range(count))
    return seeded_permutation(stream_seed(seed, "chosen", block), candidates)[:count].sort().values.tolist()
