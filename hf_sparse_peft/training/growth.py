"""Who enters a support at a move: one function a rule of `RegrowthConfig.grow`.

Every rule takes the same `Move` and returns the whole set of trained units after it, `[n]` sorted, or None where its
scores are all 0 or not finite, so that there is nothing to choose by. None of them keeps more than `O(k)` numbers and
one chunk of scores. Ties are drawn for with a seed of the move's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..optim import innermost
from ..rules.budgets import unit_sums
from ..rules.collectives import from_first_rank
from ..rules.evidence import is_evidence
from ..sparsity import excluding, make_score, random_units_outside, stream_seed, top_units
from ..sparsity.scores import chunks_of
from ..sparsity.selection import chunk_size
from .base import AdaptedLayer


@dataclass(frozen=True)
class Move:
    """What is known of one layer when its support moves."""

    part: AdaptedLayer | None
    update: int
    """The optimizer step after which it moves, from 1."""
    units: Tensor
    """Trained units, `[n]` sorted."""
    count: int
    """How many of them are dropped."""
    importance: Tensor | None
    """`[n]`, the least important leave; None where the growth chooses the whole support."""
    candidates: Tensor
    """Units whose gradients were read for this move, `[c]` sorted; empty for rules that read none."""
    gradients: Tensor
    """Their summed gradients, `[c, ...]`."""
    optimizer: Any = None

    @cached_property
    def dropped(self) -> Tensor:
        """Positions of the dropped units in `units`, `[count]`."""
        return top_units(self.importance, self.count, largest=False, seed=self.seed("drop")).long()

    @cached_property
    def survivors(self) -> Tensor:
        """Units that the drop leaves."""
        stays = torch.ones_like(self.units, dtype=torch.bool)
        stays[self.dropped] = False
        return self.units[stays]

    def completed(self, grown: Tensor) -> Tensor:
        """Survivors and `grown`, and the most important of the dropped where fewer than `count` grew."""
        grown = grown.to(self.units.dtype)
        missing = self.count - grown.numel()
        if missing:
            dropped = self.units[self.dropped]
            rest = ~torch.isin(dropped, grown)
            importance = self.importance[self.dropped][rest]
            best = top_units(importance, min(missing, int(rest.sum())), seed=self.seed("return")).long()
            grown = torch.cat([grown, dropped[rest][best]])
        return torch.cat([self.survivors, grown]).sort().values

    def seed(self, what: str) -> int:
        """A seed of this move's own: the same on every rank, in every process and after a resume."""
        seed, name = (self.part.config.seed, self.part.name) if self.part is not None else (0, "")
        return stream_seed(seed, what, self.update, name)

    def generator(self, what: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A stream from `seed(what)`."""
        return torch.Generator(device=device).manual_seed(self.seed(what))


def from_gradients(move: Move) -> Tensor | None:
    """The candidates with the largest |summed gradient|, unless they survive the drop (SpIEL-AG, RigL).

    A candidate that was just dropped may return at once.
    """
    if not is_evidence(move.gradients):
        return None
    competes = ~torch.isin(move.candidates, move.survivors)
    rivals, strength = move.candidates[competes], unit_sums(move.gradients[competes])
    if not rivals.numel():
        return move.units
    return move.completed(rivals[top_units(strength, min(move.count, rivals.numel()), seed=move.seed("grow")).long()])


def choose_units(units: Tensor, importance: Tensor, candidates: Tensor, gradients: Tensor, count: int) -> Tensor:
    """The support after `count` units with the smallest `importance` made room for the best candidates.

    Where fewer candidates than `count` compete, the most important of the dropped units stay, so that the number of
    units never changes. Without a finite gradient other than 0 all units stay.

    Shapes: `units` `[a]` sorted, `importance` `[a]`; `candidates` `[c]` sorted, `gradients` `[c, ...]`. Returns `[a]`
    sorted.
    """
    if count == 0:
        return units
    chosen = from_gradients(Move(None, 0, units, count, importance, candidates, gradients))
    return units if chosen is None else chosen


def from_sm3(move: Move) -> Tensor | None:
    r"""The entries with the largest :math:`R_i C_j` of SM3's accumulators (SpIEL-MA; Ansell et al., 2024), or the
    largest :math:`\min(R_i, C_j)` with `score='min'`, among those that were not trained before the drop.

    One chunk of rows is scored at a time: the outer product never exists. Both accumulators are divided by a power of
    two first, which changes no rank and keeps products of squared gradients away from fp32's underflow.
    """
    accumulators = innermost(move.optimizer).accumulators(move.part.values)
    if accumulators is None or not all(is_evidence(vector) for vector in accumulators):
        return None  # every step so far was skipped, or had gradients of 0
    rows, columns = (vector / 2.0 ** torch.frexp(vector.max())[1] for vector in accumulators)
    grid = move.part.layer.sparse_lora_grid[move.part.adapter]
    combine = torch.minimum if move.part.config.regrowth.grow_options.get("score") == "min" else torch.mul
    scores = chunks_of(lambda begin, end: combine(rows[begin:end, None], columns), grid, chunk_size(rows.device))
    free = grid.num_units - move.units.numel()
    return move.completed(top_units(excluding(scores, move.units), min(move.count, free), seed=move.seed("grow")))


def at_random(move: Move) -> Tensor:
    """Any units that do not survive the drop, each set equally likely (SET; Mocanu et al., 2018)."""
    grid = move.part.layer.sparse_lora_grid[move.part.adapter]
    grown = random_units_outside(grid.num_units, move.survivors, move.count, move.generator("random growth"))
    return move.completed(grown)


def at_random_unfired(move: Move) -> Tensor:
    """Random units that were never in the support; any others only where too few of them are left."""
    grid = move.part.layer.sparse_lora_grid[move.part.adapter]
    fired = fired_units(move.part).to(move.units.dtype)
    count = min(move.count, grid.num_units - fired.numel())
    grown = random_units_outside(grid.num_units, fired, count, move.generator("unfired growth"))
    if count < move.count:
        taken = torch.cat([move.survivors, grown]).sort().values
        rest = random_units_outside(grid.num_units, taken, move.count - count, move.generator("random growth"))
        grown = torch.cat([grown, rest])
    return move.completed(grown)


def from_low_rank_magnitude(move: Move) -> Tensor | None:
    r"""The largest :math:`|W_q|`, `W_q` the rank-q approximation of the current weight, base plus delta (LIFT; Liu et
    al., 2025): over all units without a drop rule, else among those that do not survive the drop.

    One fp32 copy of the layer's weight exists while it is scored. The first rank's answer is everybody's: an SVD need
    not give the same bits on every device.
    """
    layer, config = move.part.layer, move.part.config
    weight = layer.dense_base_weight().detach().to(torch.float32, copy=True)
    layer._add_delta_(weight, move.part.adapter)
    if not is_evidence(weight):
        return None
    score = make_score("low_rank_magnitude", **config.regrowth.grow_options)
    scores = score(weight, layer.sparse_lora_grid[move.part.adapter], move.generator("low-rank growth", weight.device))
    if move.importance is None:
        return from_first_rank(top_units(scores, move.units.numel(), seed=move.seed("grow")))
    grown = top_units(excluding(scores, move.survivors), move.count, seed=move.seed("grow"))
    return from_first_rank(move.completed(grown))


GROWTH_RULES: dict[str, Callable[[Move], Tensor | None]] = {
    "accumulated_gradient": from_gradients,
    "gradient": from_gradients,
    "sm3": from_sm3,
    "random": at_random,
    "random_unfired": at_random_unfired,
    "low_rank_magnitude": from_low_rank_magnitude,
}
"""`RegrowthConfig.grow` -> the rule."""


@torch.no_grad()
def mark_fired(part: AdaptedLayer, units: Tensor) -> None:
    """Set the bit of every one of the distinct `units` in the layer's record of units that were ever trained."""
    fired = part.layer.sparse_lora_fired[part.adapter]
    # One bit a unit of the weight: bits of distinct units in one byte add up without a carry.
    at, owner = torch.unique(units.long() >> 3, return_inverse=True)
    bits = torch.zeros(at.numel(), dtype=torch.int64, device=units.device)
    bits.index_add_(0, owner, torch.ones_like(bits[:1]).expand(owner.numel()) << (units.long() & 7))
    fired[at] = fired[at] | bits.to(torch.uint8)


def fired_units(part: AdaptedLayer) -> Tensor:
    """Every unit that was ever trained, sorted int64."""
    fired = part.layer.sparse_lora_fired[part.adapter]
    at = fired.nonzero().squeeze(1)
    bits = torch.arange(8, device=fired.device)
    each = (at.unsqueeze(1) * 8 + bits).reshape(-1)
    return each[((fired[at].long().unsqueeze(1) >> bits) & 1).bool().reshape(-1)]
