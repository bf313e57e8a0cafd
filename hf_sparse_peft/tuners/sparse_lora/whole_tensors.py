"""Whole tensors drawn at random up to a budget: weight matrices and pairs of low-rank factors (APET)."""

from __future__ import annotations

import torch
from peft.utils.other import get_pattern_key

from ...sparsity import UnitGrid, stream_seed
from .config import SparseLoraConfig, exact_pattern


def draw_tensors(sizes: dict[str, int], budget: int, generator: torch.Generator) -> list[str]:
    """Names of `sizes` in a random order, each taken if its numbers fit into what is left of `budget`, else skipped."""
    names, taken = list(sizes), []
    for number in torch.randperm(len(names), generator=generator).tolist():
        name = names[number]
        if sizes[name] <= budget:
            taken.append(name)
            budget -= sizes[name]
    return taken


def whole_tensor_counts(config: SparseLoraConfig, grids: dict[str, UnitGrid]) -> dict[str, int]:
    """Units of every module: all of the matrices that `allocation="tensors"` draws, none of the others (Su et al.,
    2023).

    The budget is `num_entries`, or the numbers of a LoRA of `budget_rank`, or `density` of the entries. With a low-rank
    half, one half of it goes to pairs of factors, which are drawn likewise, and one to matrices; modules whose pair was
    not drawn get rank 0 in `config.rank_pattern`.

    Raises:
        ValueError: no tensor fits.
    """
    numel = {name: grid.rows * grid.cols for name, grid in grids.items()}
    pairs = {}
    for name, grid in grids.items():
        key = get_pattern_key(config.rank_pattern.keys(), name)
        pairs[name] = config.rank_pattern.get(key, config.r) * (grid.rows + grid.cols)
    pairs = {name: size for name, size in pairs.items() if size}
    if config.num_entries is not None:
        budget = config.num_entries
    elif config.budget_rank is not None:
        budget = config.budget_rank * sum(grid.rows + grid.cols for grid in grids.values())
    else:
        budget = int(config.density * sum(numel.values()) + 1e-9)
    share = budget // 2 if pairs else budget
    draws = [torch.Generator().manual_seed(stream_seed(config.seed, "tensors", kind)) for kind in ("pairs", "weights")]
    with_pair, with_matrix = draw_tensors(pairs, share, draws[0]), draw_tensors(numel, share, draws[1])
    if not with_pair and not with_matrix:
        raise ValueError(
            f"allocation='tensors' has {share} numbers for whole matrices, and the smallest has {min(numel.values())}. "
            "Raise num_entries, budget_rank or density, or set r >= 1, whose pairs of factors are smaller."
        )
    if pairs:
        # The first key that matches counts: these come before the user's own.
        without = exact_pattern({name: 0 for name in grids if name not in with_pair})
        config.rank_pattern = {**without, **config.rank_pattern}
    return {name: grid.num_units if name in with_matrix else 0 for name, grid in grids.items()}
