"""Supports of modules that select together: channels, attention heads and whole matrices, chosen over the whole model.

block 0: gate rows, up rows, down columns    j-th of `count` equal stretches in each = structure j
block 1: ...                                 ranked or drawn within a block, or over all blocks
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ...sparsity import Random, UnitGrid, random_units, stream_seed, top_units
from ...utils.module_names import block_of
from .config import SparseLoraConfig
from .structure_config import StructureConfig

Grids = dict[str, UnitGrid]
Chunks = Callable[[], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class Pool:
    """Structures that are drawn or ranked together: those of one block, or of all blocks one after the other."""

    number: int
    """Place of the structure in `config.structures`."""
    structure: StructureConfig
    members: dict[str, list[str]]
    """Block -> its modules."""
    counts: dict[str, int]
    """Block -> how many structures it has."""

    @property
    def total(self) -> int:
        """Structures in all."""
        return sum(self.counts.values())

    @property
    def wanted(self) -> int:
        """Structures to choose, `int(density * total)`."""
        return UnitGrid(1, self.total).count_for_density(
            self.structure.density, f"{next(iter(self.members))}: {self.structure.modules}"
        )

    def size(self, block: str, grid: UnitGrid) -> int:
        """Units of one structure in a module of `block`."""
        return grid.num_units // self.counts[block]

    def units(self, best: torch.Tensor, grids: Grids) -> dict[str, torch.Tensor]:
        """Sorted units of every module for the sorted structures `best`; some may be empty."""
        chosen, start = {}, 0
        for block, names in self.members.items():
            inside = best[(best >= start) & (best < start + self.counts[block])] - start
            for name in names:
                size = self.size(block, grids[name])
                units = (inside[:, None] * size + torch.arange(size)).reshape(-1)
                chosen[name] = units.to(grids[name].index_dtype)
            start += self.counts[block]
        return chosen


def pools_of(config: SparseLoraConfig, grids: Grids, model: nn.Module) -> list[Pool]:
    """What `config.structures` chooses among in the modules of `grids`.

    Raises:
        ValueError: a structure matches no module, or its modules cannot be cut into the same structures.
    """
    pools = []
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
        together = [list(members)] if structure.scope == "model" else [[block] for block in members]
        pools += [Pool(number, structure, {b: members[b] for b in p}, {b: counts[b] for b in p}) for p in together]
    return pools


def choose_structures(
    config: SparseLoraConfig,
    grids: Grids,
    model: nn.Module,
    chunks_of_module: Callable[[str], Chunks],
) -> dict[str, torch.Tensor]:
    """The units of every module of `grids` that `config.structures` names, sorted; some may be empty.

    `chunks_of_module(name)` gives the module's score chunks, one score a unit; not asked with `criterion="random"`.
    Exactly `int(density * structures)` structures are chosen in each scope. Random ones are drawn from `config.seed`
    alone, the same on every rank.

    Raises:
        ValueError: a structure matches no module, or its modules cannot be cut into the same structures.
    """
    if not isinstance(config.criterion, Random):
        ranking = StructureRanking(config, grids, model)
        for name in ranking.names:
            ranking.add(name, chunks_of_module(name))
        return ranking.units()
    chosen = {}
    for pool in pools_of(config, grids, model):
        where = next(iter(pool.members)) if pool.structure.scope == "block" else ""
        seed = stream_seed(config.seed, "structures", pool.number, where)
        best = random_units(pool.total, pool.wanted, torch.Generator().manual_seed(seed)).long()
        chosen |= pool.units(best, grids)
    return chosen


def structure_counts(config: SparseLoraConfig, grids: Grids, model: nn.Module) -> dict[str, int]:
    """Units that `config.structures` takes in every module it names, known before they are ranked: exact where the
    scope is a block; where it is the model, room for an even share until the ranking says more."""
    counts = {}
    for pool in pools_of(config, grids, model):
        for block, names in pool.members.items():
            share = max(1, pool.wanted * pool.counts[block] // pool.total)
            counts |= {name: share * pool.size(block, grids[name]) for name in names}
    return counts


class StructureRanking:
    """The best structures by scores that come module by module, in any order; one number a structure is kept.

    A structure scores the sum over its units in all of its modules. `share` chooses that part of them.

    Raises:
        ValueError: as `pools_of`.
    """

    def __init__(self, config: SparseLoraConfig, grids: Grids, model: nn.Module, share: float = 1.0) -> None:
        self._pools, self._grids, self._share, self._seed = pools_of(config, grids, model), grids, share, config.seed
        self._scores: dict[str, torch.Tensor] = {}
        self._place = {name: (pool, b) for pool in self._pools for b, names in pool.members.items() for name in names}

    @property
    def names(self) -> list[str]:
        """Modules whose scores are asked for."""
        return list(self._place)

    def add(self, name: str, chunks: Chunks) -> None:
        """Take a module's score chunks, one score a unit."""
        pool, block = self._place[name]
        units = torch.cat([chunk.float().cpu() for chunk in chunks()])
        self._scores[name] = units.view(pool.counts[block], -1).sum(1)

    def units(self) -> dict[str, torch.Tensor]:
        """Sorted units of every module."""
        chosen = {}
        for pool in self._pools:
            # In the order of the members: what is summed in another order may rank otherwise in the last bit.
            scores = [sum(self._scores[name] for name in names) for names in pool.members.values()]
            seed = stream_seed(self._seed, "structures", pool.number, next(iter(pool.members)))
            best = top_units(torch.cat(scores), max(1, int(self._share * pool.wanted)), seed=seed).long()
            chosen |= pool.units(best, self._grids)
        return chosen


def _count(structure: StructureConfig, names: list[str], grids: Grids, model: nn.Module) -> int:
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
    shared = False
    for name in names:
        if grids[name].num_units not in (heads * size, groups * size):
            raise ValueError(
                f"'{name}' has {grids[name].num_units} {grids[name].granularity}s, not the {heads} heads or {groups} "
                f"key/value heads of {size} that the model's config names. Fused projections cannot be cut into heads; "
                "for the others, q, k, v take granularity 'row' and o takes 'column'."
            )
        shared |= grids[name].num_units == groups * size
    # Query heads that share keys and values go together only where keys or values do.
    return groups if shared else heads


def _heads(model: nn.Module, name: str) -> tuple[int, int, int]:
    """Attention heads, key/value heads and the size of a head, from the model's own config."""
    while not hasattr(model, "config") and hasattr(model, "module"):
        model = model.module  # a wrapper of distributed training
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError(f"'{name}' selects whole heads, and {type(model).__name__} has no config that counts them.")
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, groups, size
