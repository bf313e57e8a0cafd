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

from ...sparsity.selection import find_cut

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


def find_threshold(tiles: Tiles, plan: KernelPlan, numel: int) -> tuple[float, int] | None:
    r""":math:`\tau`, the largest :math:`|w|` that loses, and how many entries equal to it still win.

    Exactly `plan.survivors` entries win: all above :math:`\tau`, and on a tie the first ones in the order of
    :math:`\Delta W^\top`. None without competition. Memory: one tile.

    Raises:
        ValueError: the kernel has a NaN; names the module.
    """
    if plan.survivors is None:
        return None
    if plan.survivors >= numel:
        return 0.0, 0
    cut = find_cut([(plan.name, lambda: (w.abs().reshape(-1) for _, w in tiles()))], plan.survivors + 1)
    _, w = next(tiles())
    kind = {torch.float32: torch.int32, torch.float64: torch.int64}[w.dtype]
    tau = torch.tensor(cut.key, dtype=kind).view(w.dtype).item()  # a cut's key is the bits of a score >= 0
    return tau, cut.ties - 1


class Competition:
    """One pass of the competition over the tiles, in order."""

    def __init__(self, mode: str, threshold: tuple[float, int] | None) -> None:
        self.mode, self.threshold = mode, threshold
        self.ties = 0 if threshold is None else threshold[1]

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """What of the tile `w` is applied, and the factor of its gradient (None: 1)."""
        if self.threshold is None:
            return w, None
        tau, size = self.threshold[0], w.abs()
        if self.mode == "paper":
            excess = (size - tau).clamp_(min=0)
            return w * excess, torch.where(excess > 0, excess + size, 0.0)
        wins = size > tau
        if self.ties:
            tied = (size == tau).reshape(-1).nonzero().squeeze(1)[: self.ties]
            wins.view(-1)[tied] = True
            self.ties -= tied.numel()
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
