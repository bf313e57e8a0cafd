"""Who enters a support at a move: one class a criterion of growth, from its options to what it reads, keeps and chooses
(those that draw at random are in `random_growth`).

None of them keeps more than `O(k)` numbers and one chunk of scores. Ties are drawn for with a seed of the move's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..optim import SparseSM3, innermost
from ..sparsity import Everywhere, Pattern, Region, excluding, make_score, region_of, stream_seed, top_units
from ..sparsity.scores import chunks_of
from ..sparsity.selection import ScoreSlabs, chunk_size
from ..utils.option_types import NonNegativeInt, PositiveInt, Range
from ..utils.parts import Part, register_part
from ..utils.tensors import TensorSpec
from .choosing_readers import CandidateReader, StepReader
from .collectives import from_first_rank
from .evidence import is_evidence
from .gradient_readers import MicroBatchReader
from .run import Run
from .space import UnitSpace, unit_sums


@dataclass(frozen=True)
class Move:
    """What is known of one space when its units move."""

    space: UnitSpace | None
    update: int
    """The optimizer step after which they move, from 1."""
    units: Tensor
    """Trained units, `[n]` sorted."""
    count: int
    """How many of them are dropped."""
    importance: Tensor | None
    """`[n]`, the least important leave; None where the growth chooses the whole support."""
    optimizer: Any = None
    reader: MicroBatchReader | None = None
    """The reader that the growth gave for this step, if any."""

    @property
    def pattern(self) -> Pattern | None:
        """The shape that the support keeps to."""
        return None if self.space is None else self.space.pattern

    @cached_property
    def dropped(self) -> Tensor:
        """Positions of the dropped units in `units`, `[count]`: the least important, and before them those that the
        support's pattern gives up to move."""
        importance = self.importance
        if self.pattern is not None:
            grid, seed = self.space.grid, self.seed("pattern drop")
            leave = self.pattern.leaving(self.units, importance, self.count, grid, seed)
            importance = importance.masked_fill(leave, -torch.inf)
        return top_units(importance, self.count, largest=False, seed=self.seed("drop")).long()

    @cached_property
    def survivors(self) -> Tensor:
        """Units that the drop leaves."""
        stays = torch.ones_like(self.units, dtype=torch.bool)
        stays[self.dropped] = False
        return self.units[stays]

    def region(self, scores: ScoreSlabs) -> Region:
        """Where units may grow by `scores` of all units: everywhere, or where the support's pattern allows them beside
        the survivors."""
        kept = None if self.pattern is None or self.importance is None else self.survivors
        return region_of(self.pattern, scores, self.space.grid, kept, self.seed("pattern"))

    def random_region(self, what: str) -> Region:
        """The same for units that grow at random."""
        if self.pattern is None:
            return Everywhere(self.space.grid)
        return self.pattern.random_region(self.space.grid, self.seed(what), self.survivors)

    def best(self, scores: ScoreSlabs, taken: Tensor) -> Tensor:
        """The support with the `count` best of all units but `taken` (sorted, the survivors or more)."""
        region = self.region(scores)
        free = region.size - int(region.contains(taken).sum())
        best = top_units(excluding(region.masked(scores), taken), min(self.count, free), seed=self.seed("grow"))
        return self.completed(best, region)

    def completed(self, grown: Tensor, region: Region | None = None) -> Tensor:
        """Survivors and `grown`, and the most important of the dropped where fewer than `count` grew; with a pattern
        of those in its `region`, and random ones of it where they are too few."""
        grown = grown.to(self.units.dtype)
        missing = self.count - grown.numel()
        if missing:
            dropped = self.units[self.dropped]
            rest = ~torch.isin(dropped, grown)
            rest = rest if region is None else rest & region.contains(dropped)
            importance = self.importance[self.dropped][rest]
            best = top_units(importance, min(missing, int(rest.sum())), seed=self.seed("return")).long()
            grown = torch.cat([grown, dropped[rest][best]])
        missing = self.count - grown.numel()
        if missing and region is not None:
            taken = torch.cat([self.survivors, grown]).sort().values
            drawn = region.random_units(missing, self.generator("completing the pattern"), taken)
            grown = torch.cat([grown, drawn.to(grown)])
        return torch.cat([self.survivors, grown]).sort().values

    def seed(self, what: str) -> int:
        """A seed of this move's own: the same on every rank, in every process and after a resume."""
        seed, name = (self.space.seed, self.space.name) if self.space is not None else (0, "")
        return stream_seed(seed, what, self.update, name)

    def generator(self, what: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A stream from `seed(what)`."""
        return torch.Generator(device=device).manual_seed(self.seed(what))


@dataclass(frozen=True)
class Growth(Part):
    """Base of the growth criteria of `Regrow`: which units enter. A subclass is a registered frozen dataclass, and says
    in one place what it needs:

        @register_part("last")
        @dataclass(frozen=True)
        class Last(Growth):
            '''The units with the highest numbers.'''

            def grow(self, move):
                units = torch.arange(move.space.size - 1, -1, -1)
                return move.completed(units[~torch.isin(units, move.survivors)][: move.count])
    """

    part_kind: ClassVar[str] = "growth"
    needs: ClassVar[frozenset[str]] = frozenset()
    """As `Rule.needs`: `entries` where units must be single weight entries."""
    replaces_random_start: ClassVar[bool] = False
    """Whether the first move replaces every unit of an untrained random draw, with a linear `fraction` (SpIEL)."""
    takes_shards: ClassVar[bool] = False
    """As `Rule.takes_shards`."""
    chooses_all: ClassVar[bool] = False
    """Whether it can choose the whole support anew, without a drop criterion (`Regrow.drop=None`)."""

    @property
    def reads_for(self) -> int:
        """Optimizer steps, up to a move's own, in which it reads dense gradients through its `reader`."""
        return 0

    def first_move(self, every: int) -> int:
        """The step after which the first of the moves every `every` steps comes."""
        return every

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """Tensors (role "rule") to keep for one space, as `Rule.state`."""
        return []

    def begin(self, run: Run) -> None:
        """Training begins.

        Raises:
            ValueError: the run lacks something, e.g. the optimizer that it reads.
        """

    def reader(self, run: Run, space: UnitSpace, starts: bool, ahead: Callable[[], Move]) -> MicroBatchReader:
        """A reader of the coming step's gradient; `starts` at the first of `reads_for` steps, `ahead()` is the move as
        it would be now."""
        raise NotImplementedError

    def grow(self, move: Move) -> Tensor | None:
        """The whole set of trained units after the move, `[n]` sorted; None where the scores are all 0 or not finite,
        so that there is nothing to choose by."""
        raise NotImplementedError

    def seeds(self, move: Move) -> dict[str, Tensor] | None:
        """Optimizer state of the units that enter, as `move_units` takes it; None: zeros."""
        return None


@register_part("accumulated_gradient")
@dataclass(frozen=True)
class AccumulatedGradient(Growth):
    """The candidates with the largest |sum of gradients| over the steps before a move (SpIEL-AG; Ansell et al., 2024).

    Candidates are as many units as live, those with the largest |gradient| at the first of these steps; each step costs
    one dense gradient of one layer at a time. A candidate that was just dropped may return at once.
    """

    takes_shards: ClassVar[bool] = True

    steps: PositiveInt = 5
    """Steps before a move over which gradients are summed."""
    seed_moments: bool = True
    """Whether grown units start with moments and age estimated from their candidate gradients instead of zeros. The age
    needs an optimizer with per-unit steps (`hf_sparse_peft.optim.AgedAdamW`)."""

    replaces_random_start: ClassVar[bool] = True

    @property
    def reads_for(self) -> int:
        """All of `steps`."""
        return self.steps

    def first_move(self, every: int) -> int:
        """As soon as gradients are summed."""
        return min(self.steps, every)

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """Candidates, the sums of their gradients and of the squares, and the number of steps in them."""
        shape = tuple(space.values.shape)
        return [
            TensorSpec("candidates", shape[:1], space.grid.index_dtype, role="rule"),
            TensorSpec("candidate_sums", (2, *shape), role="rule"),
            TensorSpec("candidate_steps", (1,), torch.int32, role="rule"),
        ]

    def reader(self, run: Run, space: UnitSpace, starts: bool, ahead: Callable[[], Move]) -> MicroBatchReader:
        """Chooses the candidates and adds their gradients up."""
        return CandidateReader(space, starts, lambda scores: ahead().region(scores))

    def grow(self, move: Move) -> Tensor | None:
        """The best candidates, unless they survive the drop."""
        found = CandidateReader(move.space)
        return best_candidates(move, found.units, found.sums[0])

    def seeds(self, move: Move) -> dict[str, Tensor] | None:
        """Means of the gradients and of their squares over the steps in the sums."""
        found = CandidateReader(move.space)
        age = found.steps
        if not self.seed_moments or not age:
            return None
        return {"units": found.units, "grad_mean": found.sums[0] / age, "grad_sq_mean": found.sums[1] / age, "age": age}


@register_part("gradient")
@dataclass(frozen=True)
class Gradient(Growth):
    """The largest |dense gradient| of the move's own step (RigL; Evci et al., 2020), untrained or just dropped."""

    takes_shards: ClassVar[bool] = True

    candidates: Annotated[float, Range(least=1)] | None = None
    """With gradient accumulation a dense fp32 gradient of every adapted weight is summed during the move's step; a
    factor `c >= 1` follows the `c` times as many best units of the first micro-batch as the move grows instead."""

    @property
    def reads_for(self) -> int:
        """The move's own step."""
        return 1

    def reader(self, run: Run, space: UnitSpace, starts: bool, ahead: Callable[[], Move]) -> MicroBatchReader:
        """Keeps what can matter of the step's gradient."""
        move = ahead()
        return StepReader(space, move.count, run.training.accumulation, self.candidates, move.region)

    def grow(self, move: Move) -> Tensor | None:
        """The best units, unless they survive the drop."""
        if move.reader is None or move.reader.units is None:
            return None
        return best_candidates(move, move.reader.units, move.reader.gradients)


@register_part("sm3")
@dataclass(frozen=True)
class SM3(Growth):
    r"""The entries with the largest :math:`R_i C_j` of SM3's row and column accumulators (SpIEL-MA; Ansell et al.,
    2024), among those that were not trained before the drop. Needs `hf_sparse_peft.optim.SparseSM3`; reads no gradient.

    One chunk of rows is scored at a time: the outer product never exists.
    """

    score: Literal["product", "min"] = "product"
    r"""`product`, the paper's, or `min`: :math:`\min(R_i, C_j)`, SM3's own estimate."""

    needs: ClassVar[frozenset[str]] = frozenset({"entries"})
    replaces_random_start: ClassVar[bool] = True

    def first_move(self, every: int) -> int:
        """When SpIEL-AG's comes, which sums gradients over 5 steps."""
        return min(5, every)

    def begin(self, run: Run) -> None:
        """The optimizer must be SM3's sparse form."""
        found = innermost(run.optimizer) if run.optimizer is not None else None
        if not isinstance(found, SparseSM3):
            raise ValueError(
                f"Regrow.grow=SM3() ranks entries by SM3's accumulators, and the optimizer is {type(found).__name__}. "
                "Pass Trainer(optimizers=(methods.get('spiel-ma').optimizer(model, args), None)), or set "
                "grow=AccumulatedGradient()."
            )

    def grow(self, move: Move) -> Tensor | None:
        """The best entries outside the support."""
        accumulators = innermost(move.optimizer).accumulators(move.space.values)
        if accumulators is None or not all(is_evidence(vector) for vector in accumulators):
            return None  # every step so far was skipped, or had gradients of 0
        # A power of two changes no rank and keeps products of squared gradients away from fp32's underflow.
        rows, columns = (vector / 2.0 ** torch.frexp(vector.max())[1] for vector in accumulators)
        grid = move.space.grid
        combine = torch.minimum if self.score == "min" else torch.mul
        scores = chunks_of(lambda begin, end: combine(rows[begin:end, None], columns), grid, chunk_size(rows.device))
        return move.best(scores, move.units)


@register_part("low_rank_magnitude")
@dataclass(frozen=True)
class LowRankMagnitude(Growth):
    r"""The largest :math:`|W_q|`, `W_q` the rank-q approximation of the current weight, base plus delta (LIFT; Liu et
    al., 2025): over all units without a drop criterion, else among those that do not survive the drop.

    Options as the criterion `low_rank_magnitude` (`sparsity.scores.LowRankMagnitude`) takes them. One fp32 copy of the
    layer's weight exists while it is scored. The first rank's answer is everybody's: an SVD need not give the same bits
    on every device.
    """

    rank: PositiveInt = 64
    """Rank `q` of the approximation."""
    oversampling: NonNegativeInt | None = None
    """Extra random directions of the randomised SVD; None takes as many as `rank`."""
    power_iterations: NonNegativeInt = 12
    """Passes that sharpen the randomised subspace."""
    exact: bool = False
    """Full SVD in fp32 instead."""

    chooses_all: ClassVar[bool] = True

    def grow(self, move: Move) -> Tensor | None:
        """The best units of the current weight."""
        weight = move.space.current_weight()
        if not is_evidence(weight):
            return None
        score = make_score("low_rank_magnitude", **asdict(self))
        scores = score(weight, move.space.grid, move.generator("low-rank growth", weight.device))
        if move.importance is None:
            scores = move.region(scores).masked(scores)
            return from_first_rank(top_units(scores, move.units.numel(), seed=move.seed("grow")))
        return from_first_rank(move.best(scores, move.survivors))


def best_candidates(move: Move, candidates: Tensor, gradients: Tensor) -> Tensor | None:
    """The trained units after a move that grows the `candidates` (`[c]` sorted) with the largest |gradient|
    (`[c, ...]`) unless they survive the drop: one that was just dropped may return at once. None without a finite
    gradient other than 0."""
    if not is_evidence(gradients):
        return None
    competes = ~torch.isin(candidates, move.survivors)
    rivals, strength = candidates[competes], unit_sums(gradients[competes])
    region = None
    if move.pattern is not None:
        scores = torch.zeros(move.space.size, device=strength.device).index_put_((rivals.long(),), strength)
        region = move.region(scores)
        inside = region.contains(rivals)
        rivals, strength = rivals[inside], strength[inside]
    if not rivals.numel():
        return move.units
    best = top_units(strength, min(move.count, rivals.numel()), seed=move.seed("grow")).long()
    return move.completed(rivals[best], region)


def choose_units(units: Tensor, importance: Tensor, candidates: Tensor, gradients: Tensor, count: int) -> Tensor:
    """The support after `count` units with the smallest `importance` made room for the best candidates.

    Where fewer candidates than `count` compete, the most important of the dropped units stay, so that the number of
    units never changes. Without a finite gradient other than 0 all units stay.

    Shapes: `units` `[a]` sorted, `importance` `[a]`; `candidates` `[c]` sorted, `gradients` `[c, ...]`. Returns `[a]`
    sorted.
    """
    if count == 0:
        return units
    chosen = best_candidates(Move(None, 0, units, count, importance), candidates, gradients)
    return units if chosen is None else chosen
