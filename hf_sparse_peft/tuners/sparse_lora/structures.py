"""Supports of modules that select together: channels, attention heads and whole matrices, chosen over the whole model.

block 0: gate rows, up rows, down columns    j-th of `count` equal stretches in each = structure j
block 1: ...                                 ranked or drawn within a block, or over all blocks
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ...sparsity import Random, Score, UnitGrid, random_units, stream_seed, top_units
from ...utils.module_names import block_of, ends_with
from ...utils.option_docs import document_options
from ...utils.option_types import PositiveFraction, check_types
from ...utils.parts import require

Grids = dict[str, UnitGrid]
Chunks = Callable[[], Iterable[torch.Tensor]]


@document_options
@dataclass
class StructureConfig:
    """Units that enter a support together in several matrices of one transformer block (S2FT; Yang et al., 2024).

    Structure j of a block is the j-th of `count` equal stretches of units in every matrix named: FFN channel j is row j
    of the gate and up projections and column j of the down projection; key/value head j is its rows of `k_proj` and
    `v_proj`, the rows of all its query heads in `q_proj`, and the columns of these in `o_proj`. Where only `q_proj` and
    `o_proj` select together, or one of them alone, head j is one query head. The granularity of the
    matrices (`granularity`, `granularity_pattern`) must be `row` or `column`. A structure scores the sum of the
    criterion over all of its entries.
    """

    modules: list[str] = field(default_factory=list)
    """Endings of the names of the matrices that select together, e.g. `["gate_proj", "up_proj", "down_proj"]`."""
    unit: Literal["channel", "head", "matrix"] = "channel"
    """What is chosen: one unit of each matrix, one head (a key/value head takes its query heads along), or the matrices
    as a whole."""
    density: PositiveFraction = 0.03
    """Fraction of the structures that is chosen."""
    scope: Literal["model", "block"] = "model"
    """Whether the structures of all blocks are ranked (or drawn) together, so that counts vary by block and may be zero
    (S2FT), or every block has the same fraction."""

    def __post_init__(self) -> None:
        check_types(self)
        listed = isinstance(self.modules, (list, tuple)) and len(self.modules) > 0
        require(listed, self, "modules", "a list of endings of module names, at least one")
        self.modules = list(self.modules)

    def covers(self, module_name: str) -> bool:
        """Whether the module of that name belongs to the structure."""
        return any(ends_with(module_name, ending) for ending in self.modules)


def structure_of(structures: Sequence[StructureConfig], module_name: str) -> StructureConfig | None:
    """The structure that the module of that name selects with, if any."""
    return next((structure for structure in structures if structure.covers(module_name)), None)


def check_structures(structures: Sequence[StructureConfig]) -> None:
    """Raises `ValueError` where two structures name one module."""
    named = [name for structure in structures for name in structure.modules]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise ValueError(f"structures name {twice} more than once; a module selects with one structure only.")


@dataclass(frozen=True)
class Pool:
    """Structures that are drawn or ranked together: those of one block, or of all blocks one after the other."""

    number: int
    """Place of the structure in the list of structures."""
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


def pools_of(structures: Sequence[StructureConfig], grids: Grids, model: nn.Module) -> list[Pool]:
    """What `structures` choose among in the modules of `grids`.

    Raises:
        ValueError: a structure matches no module, or its modules cannot be cut into the same structures.
    """
    pools = []
    for number, structure in enumerate(structures):
        members: dict[str, list[str]] = {}
        for name in grids:
            if structure_of(structures, name) is structure:
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
    structures: Sequence[StructureConfig],
    criterion: Score,
    seed: int,
    grids: Grids,
    model: nn.Module,
    chunks_of_module: Callable[[str], Chunks],
) -> dict[str, torch.Tensor]:
    """The units of every module of `grids` that `structures` name, sorted; some may be empty.

    `chunks_of_module(name)` gives the module's score chunks, one score a unit; not asked where the criterion is random.
    Exactly `int(density * structures)` structures are chosen in each scope. Random ones are drawn from `seed` alone,
    the same on every rank.

    Raises:
        ValueError: a structure matches no module, or its modules cannot be cut into the same structures.
    """
    if not isinstance(criterion, Random):
        ranking = StructureRanking(structures, seed, grids, model)
        for name in ranking.names:
            ranking.add(name, chunks_of_module(name))
        return ranking.units()
    chosen = {}
    for pool in pools_of(structures, grids, model):
        where = next(iter(pool.members)) if pool.structure.scope == "block" else ""
        drawn = torch.Generator().manual_seed(stream_seed(seed, "structures", pool.number, where))
        best = random_units(pool.total, pool.wanted, drawn).long()
        chosen |= pool.units(best, grids)
    return chosen


def structure_counts(structures: Sequence[StructureConfig], grids: Grids, model: nn.Module) -> dict[str, int]:
    """Units that `structures` take in every module they name, known before they are ranked: exact where the scope is a
    block; where it is the model, room for the same fraction of every block until the ranking says more."""
    counts = {}
    for pool in pools_of(structures, grids, model):
        for block, names in pool.members.items():
            per_block = max(1, pool.wanted * pool.counts[block] // pool.total)
            counts |= {name: per_block * pool.size(block, grids[name]) for name in names}
    return counts


class StructureRanking:
    """The best structures by scores that come module by module, in any order; one number a structure is kept.

    A structure scores the sum over its units in all of its modules. `fraction` of the wanted ones are chosen.

    Raises:
        ValueError: as `pools_of`.
    """

    def __init__(
        self, structures: Sequence[StructureConfig], seed: int, grids: Grids, model: nn.Module, fraction: float = 1.0
    ) -> None:
        self._pools, self._grids, self._fraction, self._seed = pools_of(structures, grids, model), grids, fraction, seed
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
            best = top_units(torch.cat(scores), max(1, int(self._fraction * pool.wanted)), seed=seed).long()
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
