"""Data-free importance scores of a weight, one chunk of units at a time, and the selection of the best units.

A score is a part; called with a weight and a grid it returns a callable that starts a pass over fp32 score chunks, in
unit order, as `top_units` reads them. Larger is better for every score here. A unit of several entries scores the sum
of its entries' scores. The weight is read in slabs of rows: no fp32 copy of it ever exists as a whole. A score of one's
own may be used as `criterion` once it is registered:

    @register_part("product_of_norms")
    @dataclass(frozen=True)
    class ProductOfNorms(Score):
        def __call__(self, weight, grid, generator=None):
            check_weight(weight, grid, self.part_type)
            rows, columns = weight.float().norm(dim=1), weight.float().norm(dim=0)
            return chunks_of(lambda begin, end: rows[begin:end, None] * columns, grid, 1 << 20)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..utils.option_types import NonNegativeFloat, NonNegativeInt, PositiveInt
from ..utils.parts import Part, part_types, register_part
from .decomposition import greedy_low_rank
from .patterns import Everywhere, Pattern, region_of
from .selection import Source, chunk_size, find_cut, selected
from .support import UnitGrid

Chunks = Callable[[], Iterator[Tensor]]

_PRODUCT = 1 << 19
"""Entries per slab where the slab is part of a matrix product, which wants more rows than a score does."""


@dataclass(frozen=True)
class Score(Part):
    """Base of the scores: weight `[rows, cols]` -> re-readable fp32 chunks of `num_units` scores."""

    part_kind: ClassVar[str] = "score"
    needs_data: ClassVar[bool] = False
    """Whether units cannot be ranked by the weight alone."""
    is_slow: ClassVar[bool] = False
    """Whether a weight takes seconds: injection shows a bar."""

    def __call__(self, weight: Tensor | None, grid: UnitGrid, generator: torch.Generator | None = None) -> Chunks:
        """Start a pass over the scores of the grid's units."""
        raise NotImplementedError


@register_part("magnitude")
@dataclass(frozen=True)
class Magnitude(Score):
    r"""`|w|`: the largest entries of the pretrained weight.

    Weight: `[rows, cols]`, any float dtype and strides. Scores: fp32.
    Raises `ValueError` for a weight of another shape or of packed integers.
    """

    def __call__(self, weight: Tensor, grid: UnitGrid, generator: torch.Generator | None = None) -> Chunks:
        check_weight(weight, grid, "magnitude")
        return chunks_of(lambda begin, end: weight[begin:end].abs().float(), grid, chunk_size(weight.device))


@register_part("smallest_magnitude")
@dataclass(frozen=True)
class SmallestMagnitude(Score):
    r"""`-|w|`: the entries nearest zero come first (SaRA trains those; Hu et al., 2024).

    Weight: `[rows, cols]`, any float dtype and strides. Scores: fp32.
    Raises `ValueError` for a weight of another shape or of packed integers.
    """

    def __call__(self, weight: Tensor, grid: UnitGrid, generator: torch.Generator | None = None) -> Chunks:
        check_weight(weight, grid, "smallest_magnitude")
        return chunks_of(lambda begin, end: weight[begin:end].abs().float().neg_(), grid, chunk_size(weight.device))


@register_part("low_rank_magnitude")
@dataclass(frozen=True)
class LowRankMagnitude(Score):
    r"""`|W_q|`, with `W_q = U_q diag(s_q) V_q^T` the best approximation of rank `q` (LIFT; Liu et al., 2025).

    By default by `torch.svd_lowrank` (Halko et al., 2011) on one fp32 copy of the weight, seeded from `generator`
    without touching the global random state. `W_q` itself exists one slab at a time.

    Raises:
        ValueError: a weight of another shape or of packed integers, `rank` below 1, no generator unless `exact`.
    """

    rank: PositiveInt = 64
    """Rank `q` of the approximation (LIFT's `filter_rank`); above `min(rows, cols)` the score is the magnitude."""
    oversampling: NonNegativeInt | None = None
    """Extra random directions of the randomised SVD; None takes as many as `rank` (LIFT: `2q` in total)."""
    power_iterations: NonNegativeInt = 12
    """Passes over the weight and its transpose that sharpen the randomised subspace. On matrices of MiniLM 12 choose
    97 to 100 % of the entries that a full SVD does, at rank 16 and 64; 2, `torch.svd_lowrank`'s default, 59 to 96 %."""
    exact: bool = False
    """Full SVD in fp32 instead: one fp32 copy of the weight and seconds to minutes a matrix."""

    is_slow: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, weight: Tensor, grid: UnitGrid, generator: torch.Generator | None = None) -> Chunks:
        check_weight(weight, grid, "low_rank_magnitude")
        rank = min(self.rank, grid.rows, grid.cols)
        if rank == min(grid.rows, grid.cols):
            return Magnitude()(weight, grid)
        if self.exact:
            u, s, vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
            left, right = u[:, :rank] * s[:rank], vt[:rank].clone()
        else:
            left, right = self._randomised(weight.detach(), rank, generator)
        return chunks_of(lambda begin, end: (left[begin:end] @ right).abs_(), grid, _PRODUCT)

    def _randomised(self, weight: Tensor, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        if generator is None:
            raise ValueError("'low_rank_magnitude' needs a generator for its randomised SVD; pass one, or exact=True.")
        extra = rank if self.oversampling is None else self.oversampling
        directions = min(rank + extra, *weight.shape)
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        # svd_lowrank draws from the global stream only: the fork leaves that as it was.
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight.float(), q=directions, niter=self.power_iterations)
        return u[:, :rank] * s[:rank], v[:, :rank].t().contiguous()


@register_part("decomposition_residual")
@dataclass(frozen=True)
class DecompositionResidual(Score):
    r"""`|W - U V|`: what a greedy low-rank + sparse decomposition of the weight leaves (DSEE; Chen et al., 2023).

    See `decomposition.greedy_low_rank` for the fit. Its hard threshold keeps large residuals as they are, so that the
    largest of them are the largest entries of the sparse part. Holds three fp32 copies of the weight while it runs.

    Raises:
        ValueError: a weight of another shape or of packed integers, an option out of range, or no generator.
    """

    rounds: PositiveInt = 100
    """Rounds, each with more rank."""
    inner: PositiveInt = 2
    """Alternations of a round."""
    threshold: NonNegativeFloat = 0.01
    """Entries of the residual below it are left to the low-rank part."""
    rank_step: PositiveInt = 5
    """Rank that a round adds; the first has 1."""

    is_slow: ClassVar[bool] = True

    def __call__(self, weight: Tensor, grid: UnitGrid, generator: torch.Generator | None = None) -> Chunks:
        check_weight(weight, grid, "decomposition_residual")
        if generator is None:
            raise ValueError("'decomposition_residual' starts from random directions and needs a generator; pass one.")
        options = (self.rounds, self.inner, self.threshold, self.rank_step)
        U, V = greedy_low_rank(weight.detach().float(), *options, generator)
        return chunks_of(lambda begin, end: (weight[begin:end].float() - U[begin:end] @ V).abs_(), grid, _PRODUCT)


@register_part("random")
@dataclass(frozen=True)
class Random(Score):
    """One uniform number a unit, whatever its size; the same numbers at every pass.

    Takes one draw of `generator` at the call. The weight may be None. `select_units("random")` draws units directly.
    Raises `ValueError` without a generator.
    """

    def __call__(self, weight: Tensor | None, grid: UnitGrid, generator: torch.Generator | None = None) -> Chunks:
        if generator is None:
            raise ValueError("'random' needs a generator; seed one with stream_seed(seed, step, module_name).")
        device = generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))

        def chunks() -> Iterator[Tensor]:
            stream = torch.Generator(device=device).manual_seed(seed)
            numel = chunk_size(device)
            for begin in range(0, grid.num_units, numel):
                yield torch.rand(min(numel, grid.num_units - begin), generator=stream, device=device)

        return chunks


def select_units(
    criterion: str | Score,
    weight: Tensor | None,
    grid: UnitGrid,
    k: int,
    *,
    generator: torch.Generator | None = None,
    name: str = "",
    pattern: Pattern | None = None,
    **options: Any,
) -> Tensor:
    """The `k` best units of `weight` (`[rows, cols]`, floating point) by a score, or the one of that name and options.

    Ties are drawn for with the seed that `generator` was given (0 without one), see `top_units`. `name` is the
    module's, for errors. With a `pattern` all lie in its best region, of which they are the best.

    Returns sorted distinct units `[k]` of `grid.index_dtype`, on the weight's device (`random`: the generator's device
    if the weight is None).

    Raises:
        ValueError: unknown criterion or option, a criterion that needs a weight without one, a weight of another
            shape, a missing generator, NaN or infinity in the weight, or `k` outside `0 .. num_units`.
    """
    score = criterion if isinstance(criterion, Score) else make_score(criterion, **options)
    if pattern is not None:
        pattern.check_count(k, grid, name)
    if isinstance(score, Random):
        free = pattern is None or generator is None
        region = Everywhere(grid) if free else pattern.random_region(grid, generator.initial_seed())
        units = region.random_units(k, generator)
        return units if weight is None else units.to(weight.device)
    if weight is None:
        raise ValueError(
            f"criterion='{score.part_type}' scores the base weight and got None. Only 'random' does without one."
        )
    chunks, seed = score(weight, grid, generator), 0 if generator is None else generator.initial_seed()
    source = Source(name, region_of(pattern, chunks, grid, seed=seed).masked(chunks), seed)
    return selected(source, find_cut([source], k, finite=True))


def make_score(criterion: str, **options: Any) -> Score:
    """The score of that name with its options set.

    Raises:
        ValueError: unknown criterion or option; lists what is accepted.
    """
    known = part_types(Score)
    if criterion not in known:
        raise ValueError(f"criterion='{criterion}' is unknown. Accepted: {', '.join(known)}.")
    accepted = [field.name for field in fields(known[criterion])]
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(
            f"criterion='{criterion}' does not take {', '.join(unknown)}. "
            f"Accepted options: {', '.join(accepted) or 'none'}."
        )
    return known[criterion](**options)


def check_weight(weight: Tensor | None, grid: UnitGrid, criterion: str) -> None:
    """Raises `ValueError` unless `weight` is a floating-point `[rows, cols]` tensor with data."""
    if weight is None:
        raise ValueError(
            f"criterion='{criterion}' scores the base weight and got None. Only 'random' does without one."
        )
    if not weight.is_floating_point():
        raise ValueError(f"criterion='{criterion}' got a {weight.dtype} weight. Pass it dequantised.")
    if tuple(weight.shape) != (grid.rows, grid.cols):
        raise ValueError(
            f"criterion='{criterion}' got a weight of shape {tuple(weight.shape)} for a grid of "
            f"{grid.rows}x{grid.cols}. Pass the weight as [rows, cols] (transpose Conv1D, dequantise 4-bit)."
        )
    if weight.is_meta:
        raise ValueError(
            f"criterion='{criterion}' got a weight on the meta device, which has no values. Load it first."
        )


def chunks_of(entry_scores: Callable[[int, int], Tensor], grid: UnitGrid, numel: int) -> Chunks:
    """Per-unit score chunks from `entry_scores(begin, end)`: fp32 scores `[end - begin, cols]` of some rows.

    `numel`: entries to score at once; at least one row (of blocks) is.
    """
    size = grid.block_size
    height = grid.values_shape(1)[1] if grid.granularity in ("block", "diagonal") else 1

    def chunks() -> Iterator[Tensor]:
        total = None
        for begin, end in _slabs(grid.rows, grid.cols, numel, height):
            with torch.no_grad():
                scores = entry_scores(begin, end)
                if grid.granularity == "column":
                    part = scores.sum(0)
                    total = part if total is None else total.add_(part)
                    continue
                if grid.granularity == "row":
                    scores = scores.sum(1)
                elif grid.granularity == "block":
                    scores = scores.reshape(-1, size, grid.cols // size, size).sum((1, 3))
                elif grid.granularity == "diagonal":
                    scores = _diagonal_sums(scores, begin // height, *grid.values_shape(1)[1:])
            yield scores.reshape(-1)
        if total is not None:
            yield total

    return chunks


def _diagonal_sums(scores: Tensor, first: int, height: int, width: int) -> Tensor:
    """Sums over the diagonal blocks from `first` on that the rows `scores` `[h, cols]` cross, fp32 `[k]`."""
    count = -(-scores.shape[0] // height)
    square = scores[:, first * width : (first + count) * width]
    missing = (0, count * width - square.shape[1], 0, count * height - square.shape[0])
    square = torch.nn.functional.pad(square, missing).view(count, height, count, width)
    return square.diagonal(dim1=0, dim2=2).sum((0, 1))


def _slabs(rows: int, cols: int, numel: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    height = max(1, numel // (cols * multiple)) * multiple
    for begin in range(0, rows, height):
        yield begin, min(begin + height, rows)
