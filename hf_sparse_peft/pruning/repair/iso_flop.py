"""Sizes of Sparse-IFT: larger sparse layers with the multiplications of a dense one (Thangarasa et al., 2024)."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn

from ..reading.one_shot import prunable_layers

Member = Literal["wide", "parallel", "factorized", "doped"]


def iso_flop_size(member: Member, rows: int, cols: int, sparsity: float) -> int:
    r"""The size of a family member that makes as many multiplications as a dense linear layer of `cols` inputs and
    `rows` outputs, :math:`m n`, at a sparsity `s` of its sparse weights.

    `wide`: the number of inputs of the wider layer, :math:`\lfloor n / \sqrt{1-s} \rfloor` (outputs likewise).
    `parallel`: the number of sparse branches, :math:`1 / (1-s)` rounded. `factorized`: the inner width of two sparse
    factors, :math:`\lceil mn / ((m+n)(1-s)) \rceil`. `doped`: the rank of a dense low-rank term beside one sparse
    weight, :math:`\lfloor s\,mn / (m+n) \rfloor`. Rounding leaves a few multiplications more (factorized) or less
    (doped).

    Only `doped` starts from a pretrained weight: it is a LoRA beside a base pruned to `s` (`doped_ranks`). The others
    change a model's width or add layers, and train from scratch: `sparse_ift` builds them.

    Raises:
        ValueError: an unknown member, a side below 1, or a sparsity outside [0, 1).
    """
    if min(rows, cols) < 1:
        raise ValueError(f"rows={rows}, cols={cols}: a layer has at least one of each.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is no fraction in [0, 1).")
    dense, kept = rows * cols, 1 - sparsity
    sizes = {
        "wide": lambda: math.floor(_exactly(cols / math.sqrt(kept))),
        "parallel": lambda: round(1 / kept),
        "factorized": lambda: math.ceil(_exactly(dense / ((rows + cols) * kept))),
        "doped": lambda: math.floor(_exactly(sparsity * dense / (rows + cols))),
    }
    if member not in sizes:
        raise ValueError(f"member={member!r} is unknown; choose one of {list(sizes)}.")
    return sizes[member]()


def doped_ranks(
    model: nn.Module, sparsity: float, target_modules: Any = "all-linear", exclude_modules: Any = None
) -> dict[str, int]:
    """Ranks by module name with which a LoRA beside each linear layer, pruned to `sparsity`, makes the multiplications
    of the dense layer (Sparse-IFT's doped member), as `rank_pattern` of a config takes them.

    Raises:
        ValueError: a sparsity outside [0, 1), or one at which a layer gets no rank.
    """
    found = {}
    for layer in prunable_layers(model, target_modules, exclude_modules):
        found[f"^{layer.name}"] = rank = iso_flop_size("doped", layer.grid.rows, layer.grid.cols, sparsity)
        if not rank:
            raise ValueError(f"sparsity={sparsity} leaves no rank for '{layer.name}': raise it, or exclude the module.")
    return found


def _exactly(value: float) -> float:
    """Without the last bits' noise, which would round a whole number to its neighbour."""
    return round(value, 9)
