r"""The kernels, tile by tile, and the competition of their entries. Plain tensors in and out.

A tile is some input rows of the transposed update :math:`\Delta W^\top` `[in, out]` with the whole output axis, which
is the axis of the mixed kernel's softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...sparsity import stream_seed
from ...sparsity.selection import Source, find_cut, lowest_priority

Tiles = Callable[[], Iterator[tuple[slice, Tensor]]]
"""A fresh pass over all tiles: which input rows, and the kernel there."""


@dataclass(frozen=True)
class KernelPlan:
    """What one layer's update is, beside its factors."""

    scale: float
    """The factor c."""
    mode: str
    """`"paper"` or `"code"`."""
    survivors: int | None
    """Entries that win; None: no competition."""
    tile_entries: int
    """Entries of a tile, at most (but one input row at least)."""
    dtype: torch.dtype
    """Dtype of the products with activations."""
    name: str = ""
    """Module name, for errors."""


class _PairDistance(torch.autograd.Function):
    r""":math:`\|l_i - r_j\|_2`, `[a, d]` and `[b, d]` to `[a, b]`; gradient 0 where two points coincide.

    By differences, not by the product formula: nearby points do not cancel, and an entry does not depend on how the
    matrix is cut into tiles, so that every pass finds the same bits.
    """

    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor) -> Tensor:
        distance = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(left, right, distance)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right, distance = ctx.saved_tensors
        ratio = torch.where(distance > 0, grad / distance, 0.0)
        return (
            left * ratio.sum(1, keepdim=True) - ratio @ right,
            right * ratio.sum(0).unsqueeze(1) - ratio.t() @ left,
        )


def kernel_tile(P: Tensor, Q: Tensor, mix: Tensor | None, scale: float) -> Tensor:
    r"""The kernel of some inputs with all outputs, `[2, rows, q/2]` and `[2, out, q/2]` to `[rows, out]`.

    :math:`D = c\,(\|P_1 - Q_1\| - \|P_2 - Q_2\|)` (Shen et al., 2024), and with `mix` :math:`= (a, g, b)` the mixed
    kernel :math:`D + a\,\mathrm{softmax}_{out}(D / g) + b` (Shen et al., 2025). fp32 (or fp64) in and out.
    """
    D = scale * (_PairDistance.apply(P[0], Q[0]) - _PairDistance.apply(P[1], Q[1]))
    if mix is None:
        return D
    a, g, b = mix.unbind()
    return D + a * torch.softmax(D / g, dim=-1) + b


def tile_rows(rows: int, cols: int, tile_entries: int) -> list[slice]:
    """Consecutive slices of `rows` input rows with at most `tile_entries` entries, one row at least."""
    step = max(1, tile_entries // cols)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def tiles_of(P: Tensor, Q: Tensor, mix: Tensor | None, plan: KernelPlan) -> Tiles:
    """All tiles without gradients: a single one is built once and held, several are built anew in every pass."""
    slices = tile_rows(P.shape[1], Q.shape[1], plan.tile_entries)

    def build(rows: slice) -> tuple[slice, Tensor]:
        with torch.no_grad():
            return rows, kernel_tile(P[:, rows], Q, mix, plan.scale)

    if len(slices) == 1:
        held = [build(slices[0])]
        return lambda: iter(held)
    return lambda: (build(rows) for rows in slices)


@dataclass(frozen=True)
class Threshold:
    """Who wins a competition."""

    tau: float
    """All entries with a larger magnitude win."""
    ties: int
    """How many of those with exactly this magnitude win as well (`mode="code"`)."""
    source: Source
    """Decides which (`sparsity.selection.tie_priority`, by the module's name)."""
    priority: int | None
    """The lowest priority among the winners at `tau`; None: none wins."""


def find_threshold(tiles: Tiles, plan: KernelPlan, numel: int) -> Threshold | None:
    r""":math:`\tau`, the largest :math:`|w|` that loses, and which entries equal to it still win.

    Exactly `plan.survivors` entries win: all above :math:`\tau`, and on a tie drawn ones, the same in every pass. None
    without competition. Memory: one tile.

    Raises:
        ValueError: the kernel has a NaN; names the module.
    """
    if plan.survivors is None:
        return None
    source = Source(plan.name, lambda: (w.abs().reshape(-1) for _, w in tiles()), stream_seed(0, plan.name))
    if plan.survivors >= numel:
        return Threshold(0.0, 0, source, None)
    _, w = next(tiles())
    if w.is_meta:
        return Threshold(0.0, 0, source, None)
    cut = find_cut([source], plan.survivors + 1, draw=False)
    kind = {torch.float32: torch.int32, torch.float64: torch.int64}[w.dtype]
    tau = torch.tensor(cut.key, dtype=kind).view(w.dtype).item()  # a cut's key is the bits of a score >= 0
    # At 0 it is all the same who wins. Only `code` lets anybody win at the threshold.
    ties = cut.ties - 1 if tau and plan.mode == "code" else 0
    return Threshold(tau, ties, source, lowest_priority([source], cut.key, ties) if ties else None)


class Competition:
    """One pass of the competition over the tiles, in order."""

    def __init__(self, mode: str, threshold: Threshold | None) -> None:
        self.mode, self.threshold, self.start = mode, threshold, 0

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """What of the tile `w` is applied, and the factor of its gradient (None: 1)."""
        if self.threshold is None:
            return w, None
        tau, size = self.threshold.tau, w.abs()
        if self.mode == "paper":
            excess = (size - tau).clamp_(min=0)
            return w * excess, torch.where(excess > 0, excess + size, 0.0)
        wins = size > tau
        if self.threshold.priority is not None:
            at = (size == tau).reshape(-1).nonzero().squeeze(1)
            wins.view(-1)[at] = self.threshold.source.priorities(at, self.start) >= self.threshold.priority
        self.start += w.numel()
        factor = size * wins
        return w * factor, factor


def update_tiles(P: Tensor, Q: Tensor, mix: Tensor | None, plan: KernelPlan) -> Iterator[tuple[slice, Tensor]]:
    r"""The competed update :math:`\Delta W^\top`, tile after tile, fp32 (fp64 for fp64 factors), without gradients."""
    P, Q, mix = masters(P, Q, mix)
    tiles = tiles_of(P, Q, mix, plan)
    compete = Competition(plan.mode, find_threshold(tiles, plan, P.shape[1] * Q.shape[1]))
    for rows, w in tiles():
        yield rows, compete(w)[0]


def masters(P: Tensor, Q: Tensor, mix: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors in the dtype of the kernel: distances of nearby points cancel in less than fp32."""
    dtype = torch.promote_types(P.dtype, torch.float32)
    return P.detach().to(dtype), Q.detach().to(dtype), None if mix is None else mix.detach().to(dtype)
