"""What the ranks of a run send each other: per step, by the way it is sharded, and per move, by its rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..rules import AccumulatedGradient, Allocate, Gradient, LowRankMagnitude, Regrow
from ..rules.collectives import BUCKET
from .base_groups import BaseGroup

if TYPE_CHECKING:
    from ..rules import UnitSpace

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast"]
_DDP_BUCKETS = (1 << 20, 25 << 20)
"""DDP's: the first is closed early, so that its reduction starts while the backward pass goes on."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind."""

    when: Literal["step", "move"]
    """Optimizer step without accumulation, or all that a move takes beyond the steps that it reads gradients in."""
    what: str
    collective: Collective
    sizes: tuple[int, ...]
    """Bytes of each: of the whole tensor that every rank has before it (sums) or after it (gathers)."""

    @property
    def count(self) -> int:
        """How many collectives."""
        return len(self.sizes)

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return sum(self.sizes)

    def sent(self, processes: int) -> int:
        r"""Bytes that a rank of `R` sends in rings: :math:`2\frac{R-1}{R}n` of a sum, :math:`\frac{R-1}{R}n` of the
        others."""
        return int((2 if self.collective == "all_reduce" else 1) * (processes - 1) / processes * self.bytes)


def step_traffic(
    sharding: str, groups: Sequence[BaseGroup], trained: Sequence[tuple[int, int]], buffers: int, width: int
) -> list[Traffic]:
    """Collectives of one optimizer step of one micro-batch, in whose backward pass every layer takes part.

    Args:
        groups: of the base, as `base_groups`.
        trained: numbers and bytes of each trained parameter.
        buffers: bytes of the base's buffers, which DDP sends; it passes by an adapter's (`tuners.shared.ranks`).
        width: bytes of a trained number under ZeRO-3.
    """
    numbers, sizes = [one for one, _ in trained], [size for _, size in trained]
    if sharding == "ddp":
        found = [
            Traffic("step", "gradients of adapters", "all_reduce", ddp_buckets(sizes)),
            Traffic("step", "which parameters were used", "all_reduce", (4 * len(sizes),) if sizes else ()),
            Traffic("step", "buffers of the base", "broadcast", (buffers,) if buffers else ()),
        ]
    elif sharding == "fsdp2":
        gathers = [group.bytes for group in groups] + [group.bytes for group in groups if not group.root]
        found = [
            Traffic("step", "base, forward and backward", "all_gather", tuple(gathers)),
            Traffic("step", "which gradients exist", "all_reduce", (4 * len(sizes),) if sizes else ()),
            Traffic("step", "gradients of adapters", "all_reduce", buckets_of(trained)),
        ]
    else:
        base = [math.ceil(group.bytes / group.modules) for group in groups for _ in range(group.modules)]
        own = tuple(width * one for one in numbers)
        found = [
            Traffic("step", "base, forward and backward", "all_gather", (*base, *base)),
            Traffic("step", "adapter values, forward and backward", "all_gather", own + own),
            Traffic("step", "gradients of adapters", "reduce_scatter", own),
        ]
    return [one for one in found if one.sizes]


def ddp_buckets(sizes: Iterable[int]) -> tuple[int, ...]:
    """Bytes of DDP's buckets, of parameters of `sizes` in the order in which the model has them: filled from the last
    on, and closed once 1 MiB is reached for the first, 25 MiB for the others."""
    found, current = [], 0
    for size in reversed(list(sizes)):
        current += size
        if current >= _DDP_BUCKETS[bool(found)]:
            found.append(current)
            current = 0
    return tuple([*found, current] if current else found)


def buckets_of(tensors: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Bytes of the sums in which tensors, of so many numbers and bytes, are averaged together: adapters' gradients
    under FSDP2, candidates' always. Of 16 million numbers at most (`rules.collectives.BUCKET`), or of one tensor."""
    found, numbers, current = [], 0, 0
    for one, size in tensors:
        if numbers and numbers + one > BUCKET:
            found.append(current)
            numbers = current = 0
        numbers, current = numbers + one, current + size
    return tuple([*found, current] if current else found)


def move_traffic(
    rule: Any,
    spaces: Sequence[UnitSpace],
    *,
    itemsize: int,
    accumulation: int = 1,
    fraction: float | None = None,
) -> list[Traffic] | None:
    r"""Collectives of one move of `rule`, whatever the sharding; None for a rule that is not counted here.

    Of a weight `[m, n]` whose support has `k` units of `u` numbers, with `s` steps of gradients:

    * `Regrow(grow=AccumulatedGradient(s))`: one mean of the dense gradient, `mn` numbers in its own dtype, when the
      candidates are chosen, and `s` times `ku` fp32 numbers, those of all weights together (`buckets_of`).
    * `Regrow(grow=Gradient())`: the dense gradient, and :math:`(k + c)u` fp32 numbers, `c` the units that leave
      (`candidates` times as many with that option), of all weights together; with accumulation and no `candidates` one
      of `mn` fp32 numbers.
    * `Regrow(grow=LowRankMagnitude())`: `k` units' numbers are sent from the first rank.
    * other growths of `Regrow`, `Allocate` of ranks, supports and rows: nothing; scores come from gradients that are
      averaged already, ties from seeds. `Allocate` of kernels: one fp64 score of each matrix.

    Before dense gradients of which units are chosen, one sum of 4 bytes a weight tells which layers ran where.

    What holds units or parameters still (`UpdateMask`) sends nothing.

    Args:
        itemsize: bytes of a number of the dense gradient.
        accumulation: micro-batches of a step.
        fraction: of the units, which the move replaces; None: the largest, at the start of the rule's curve.
    """
    if isinstance(rule, Allocate):
        scores = (8 * len(spaces),) if "kernel" in rule.spaces and spaces else ()
        return [Traffic("move", "scores of matrices", "all_reduce", scores)] if scores else []
    if not isinstance(rule, Regrow):
        return None
    grow, dense, sent = rule.grow, [], []
    units: list[tuple[int, int]] = []  # numbers and bytes of each weight's, at one step
    for space in spaces:
        rows, cols = space.weight_shape
        count, numel = space.count, space.unit_numel
        if isinstance(grow, AccumulatedGradient):
            dense.append(itemsize * rows * cols)
            units.append((count * numel, 4 * count * numel))
        elif isinstance(grow, Gradient):
            leave = int((rule.curve(0.0) if fraction is None else fraction) * count)
            if accumulation > 1 and grow.candidates is None:
                dense.append(4 * rows * cols)
                continue
            follows = leave if grow.candidates is None else int(grow.candidates * leave)
            dense.append(itemsize * rows * cols)
            followed = numel * (count + min(follows, space.size - count))
            units.append((followed, 4 * followed))
        elif isinstance(grow, LowRankMagnitude):
            sent.append(count * _index_bytes(space))
    found = [
        Traffic("move", "which layers ran", "all_reduce", (4 * len(spaces),) if units else ()),
        Traffic("move", "dense gradients", "all_reduce", tuple(dense)),
        Traffic("move", "gradients of units", "all_reduce", buckets_of(units) * getattr(grow, "steps", 1)),
        Traffic("move", "units", "broadcast", tuple(sent)),
    ]
    return [one for one in found if one.sizes]


def _index_bytes(space: UnitSpace) -> int:
    return space.grid.index_dtype.itemsize
