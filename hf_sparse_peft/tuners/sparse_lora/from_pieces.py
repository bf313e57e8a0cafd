"""The config of an adapter whose pieces are there already: the combination of others."""

from __future__ import annotations

import copy
from collections import Counter

from ...sparsity import Random
from ..shared.pieces import Entries, LowRank, Piece
from .config import SCHEDULES, SparseLoraConfig, exact_pattern


def config_of_pieces(like: SparseLoraConfig, pieces: dict[str, list[Piece]]) -> SparseLoraConfig:
    """`like` without schedules and with the sizes of `pieces`, at most one `LowRank` and one `Entries` a module."""
    low_rank = {name: next((p for p in found if isinstance(p, LowRank)), None) for name, found in pieces.items()}
    entries = {name: next((p for p in found if isinstance(p, Entries)), None) for name, found in pieces.items()}
    config = copy.deepcopy(like)
    for name in SCHEDULES:  # masked factors are folded, like the scaling
        setattr(config, name, None)
    config.schedule, config.gate = [], None  # so are gates
    config.structures, config.scale_support, config.support_init = [], False, "zeros"
    config.use_rslora = False  # scaling is folded into the factors: alpha = r makes it 1
    config.criterion = Random()
    grids = {name: piece.grid for name, piece in entries.items() if piece is not None}
    kinds = Counter(grid.granularity for grid in grids.values())
    config.granularity = kinds.most_common(1)[0][0] if kinds else "entry"
    config.granularity_pattern = exact_pattern(
        {name: grid.granularity for name, grid in grids.items() if grid.granularity != config.granularity}
    )
    sizes = {grid.block_size for grid in grids.values() if grid.granularity == "block"}
    config.block_size = sizes.pop() if sizes else config.block_size
    ranks = {name: 0 if piece is None else piece.A.shape[0] for name, piece in low_rank.items()}
    units = {name: 0 if piece is None else piece.units.numel() for name, piece in entries.items()}
    config.sizes = {name: [units[name], units[name], ranks[name]] for name in pieces}
    if not any(units.values()):
        config.density, config.budget = 0.0, None
    config.rank_pattern = {}
    config.alpha_pattern = exact_pattern({name: float(max(rank, 1)) for name, rank in ranks.items()})
    config.r = max(ranks.values())
    return config
