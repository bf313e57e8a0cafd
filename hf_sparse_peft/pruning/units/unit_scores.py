"""Scores of heads and channels: sums over the rows and columns that a unit owns, and what is kept by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...sparsity import lowest_of_rows
from .structure import BlockStructure, Kind, Member, linear_shape

UnitScores = dict[str, dict[Kind, Tensor]]
"""fp32 `[units]` on the CPU by block and kind, the highest kept first."""


def weight_of(model: nn.Module, name: str) -> Tensor:
    """A dense layer's weight as `[out, in]`, its own memory."""
    module = model.get_submodule(name)
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def lines_by_unit(vector: Tensor, member: Member, units: int) -> Tensor:
    """What a vector of a member's rows (or columns) says of each unit: `[units, span]`, a view."""
    return vector[member.start : member.start + units * member.span].view(units, member.span)


def sum_by_unit(matrix: Tensor, member: Member, units: int) -> Tensor:
    """Sum over the entries of `matrix` `[out, in]` that each unit owns in it, `[units]`."""
    return lines_by_unit(matrix.sum(1 - member.axis), member, units).sum(1)


def entries_of_unit(model: nn.Module, structure: BlockStructure, kind: Kind) -> int:
    """Weights that a unit owns in all its layers, biases not counted."""
    return sum(
        member.span * linear_shape(model.get_submodule(member.module))[1 - member.axis]
        for member in structure.members(kind)
    )


def lora_gradient(a: Tensor, b: Tensor, gradient_a: Tensor, gradient_b: Tensor) -> Tensor:
    r"""LoRA's estimate of the gradient of a weight, :math:`\hat G = g_B A + B g_A - g_B g_A`: what BA changes by in a
    unit step of gradient descent (LoRAPrune; Zhang et al., 2024). Not linear in the gradients: unscale them first.

    Shapes: A, :math:`g_A` `[r, in]`; B, :math:`g_B` `[out, r]`. Returns `[out, in]`.
    """
    return gradient_b @ a + b @ gradient_a - gradient_b @ gradient_a


def kept_by_block(scores: Tensor, sparsity: float) -> Tensor:
    """Units that stay of one block when the `int(sparsity * units)` lowest go, of equals the earlier; sorted int64."""
    gone = lowest_of_rows(scores[None], int(sparsity * len(scores) + 1e-9))[0]  # 0.29 * 100 is 28.99...
    return (~gone).nonzero().flatten().cpu()


def kept_over_all(
    scores: UnitScores, costs: dict[str, dict[Kind, int]], sparsity: float
) -> dict[str, dict[Kind, Tensor]]:
    """Units that stay when all compete with one another: the lowest go, of equals the earlier block's, while what they
    own is at most `sparsity` of all entries. The highest unit of each kind in each block stays.

    Args:
        scores: by block and kind.
        costs: entries that a unit owns, by block and kind.
        sparsity: fraction of the entries that goes.
    """
    places = [(block, kind) for block, kinds in scores.items() for kind in kinds]
    sizes = torch.tensor([len(scores[block][kind]) for block, kind in places])
    flat = torch.cat([scores[block][kind].double() for block, kind in places])
    cost = torch.cat([torch.full((size,), costs[b][k]) for (b, k), size in zip(places, sizes.tolist(), strict=True)])
    budget, stays, at = sparsity * int(cost.sum()) + 1e-9, torch.zeros(len(flat), dtype=torch.bool), 0
    for (block, kind), size in zip(places, sizes.tolist(), strict=True):
        stays[at + int(scores[block][kind].argmax())] = True
        at += size
    order = flat.masked_fill(stays, torch.inf).argsort(stable=True)
    order = order[: len(flat) - int(stays.sum())]
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[order[cost[order].cumsum(0) <= budget]] = True
    found: dict[str, dict[Kind, Tensor]] = {block: {} for block, _ in places}
    for (block, kind), part in zip(places, gone.split(sizes.tolist()), strict=True):
        found[block][kind] = (~part).nonzero().flatten()
    return found
