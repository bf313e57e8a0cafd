"""Supports of modules that select together: channels, attention heads and whole matrices, chosen over the whole model.

block 0: gate rows, up rows, down columns    j-th of `count` equal stretches in each = structure j
block 1: ...                                 ranked or drawn within a block, or over all blocks
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from ...sparsity import UnitGrid, random_units, stream_seed, top_units
from .config import SparseLoraConfig
from .structure_config import StructureConfig


def block_of(module_name: str) -> str:
    """The transformer block that a module lies in: its name up to the last number, or "" without one."""
    found = re.match(r"(.*\.)?\d+(?=\.|$)", module_name)
    return found.group(0) if found else ""


def choose_structures(
    config: SparseLoraConfig,
    grids: dict[str, UnitGrid],
    model: nn.Module,
    chunks_of_module: Callable[[str], Callable],
) -> dict[str, torch.Tensor]:
    """The units of every module of `grids` that `config.structures` names, sorted; some may be empty.

    `chunks_of_module(name)` gives the module's score chunks, one score a unit; not asked with `criterion="random"`.
    Exactly `int(density * structures)` structures are chosen in each scope. Random ones are drawn from `config.seed`
    alone, the same on every rank.

    Raises:
        ValueError: a structure matches no module, or its modules cannot be cut into the same structures.
    """
    chosen = {}
    for number, structure in enumerate(config.structures):
        members: dict[str, list[str]] = {}
        for name in grids:
            if config.structure_of(name) is structure:
                members.setdefault(block_of(name), []).append(name)
        if not members:
            raise ValueError(
                f"structures[{number}] names {structure.modules}, and target_modules has none of them. Target them, or "
                "leave the structure out."
            )
        counts = {block: _count(structure, names, grids, model) for block, names in members.items()}
        pools = [list(members)] if structure.scope == "model" else [[block] for block in members]
        for pool in pools:
            total = sum(counts[block] for block in pool)
            wanted = UnitGrid(1, total).count_for_density(structure.density, f"{pool[0]}: {structure.modules}")
            if config.criterion == "random":
                seed = stream_seed(config.seed, "structures", number, pool[0] if structure.scope == "block" else "")
                best = random_units(total, wanted, torch.Generator().manual_seed(seed)).long()
            else:
                scores = [_scores(members[block], counts[block], chunks_of_module) for block in pool]
                best = top_units(torch.cat(scores), wanted).long()
            start = 0
            for block in pool:
                inside = best[(best >= start) & (best < start + counts[block])] - start
                for name in members[block]:
                    chosen[name] = _units(inside, grids[name], counts[block])
                start += counts[block]
    return chosen


def _count(structure: StructureConfig, names: list[str], grids: dict[str, UnitGrid], model: nn.Module) -> int:
    """How many structures a block has; checks that each of its modules can be cut into them."""
    for name in names:
        if grids[name].granularity not in ("row", "column"):
            raise ValueError(
                f"'{name}' selects whole structures, which are rows or columns of it, and its granularity is "
                f"'{grids[name].granularity}'. Set granularity_pattern={{'{name.rpartition('.')[2]}': 'row'}} (or "
                "'column')."
            )
    if structure.unit == "matrix":
        return 1
    if structure.unit == "channel":
        sizes = {name: grids[name].num_units for name in names}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"One structure of channels has modules of different sizes: {sizes} (in rows or columns). Set "
                "granularity_pattern so that channels line up, e.g. rows of up_proj and columns of down_proj."
            )
        return next(iter(sizes.values()))
    heads, groups, size = _heads(model, names[0])
    for name in names:
        if grids[name].num_units not in (heads * size, groups * size):
            raise ValueError(
                f"'{name}' has {grids[name].num_units} {grids[name].granularity}s, not the {heads} heads or {groups} "
                f"key/value heads of {size} that the model's config names. Fused projections cannot be cut into heads; "
                "for the others, q, k, v take granularity 'row' and o takes 'column'."
            )
    return groups


def _heads(model: nn.Module, name: str) -> tuple[int, int, int]:
    """Attention heads, key/value heads and the size of a head, from the model's own config."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError(f"'{name}' selects whole heads, and {type(model).__name__} has no config that counts them.")
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, groups, size


def _scores(names: list[str], count: int, chunks_of_module: Callable[[str], Callable]) -> torch.Tensor:
    """`[count]` fp32: the sum of the units' scores over all modules."""
    total = 0
    for name in names:
        units = torch.cat([chunk.float().cpu() for chunk in chunks_of_module(name)()])
        total = total + units.view(count, -1).sum(1)
    return total


def _units(structures: torch.Tensor, grid: UnitGrid, count: int) -> torch.Tensor:
    size = grid.num_units // count
    return (structures[:, None] * size + torch.arange(size)).reshape(-1).to(grid.index_dtype)
