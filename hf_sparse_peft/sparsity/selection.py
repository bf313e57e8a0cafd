r"""Exact selection of the best units, and of random ones, in memory of one chunk plus the answer.

`torch.topk` and `torch.sort` over all scores of a layer cost an int64 index per score; `torch.quantile` refuses more
than 2**24 of them. Here the bits of a float score are read as an integer key of the same order, its k-th largest value
is found by counting 8 to 11 of its bits at a time (two passes over 16-bit scores, three over fp32), and one more pass
collects. Equal scores at the end of the selection are drawn for, over the whole weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ScoreSlabs = Tensor | Callable[[], Iterable[Tensor]] | Iterable[Tensor]
"""Scores of all units in order: one 1-D tensor, a list of consecutive 1-D chunks, or a callable that returns a fresh
iterator of them. The scores are read three to seven times, so a bare generator is refused."""

_CPU_CHUNK = 1 << 15
_ACCELERATOR_CHUNK = 1 << 22
# Counting into 2,048 bins stays in the first-level cache; 65,536 bins in one pass cost more than the passes they save.
_DIGITS = {16: (8, 8), 32: (11, 11, 10), 64: (11, 11, 11, 11, 10, 10)}
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
# SplitMix64's constants as signed 64-bit integers: torch multiplies int64 modulo 2**64, as the generator does.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_CHANGED = "The scores changed between two passes: the callable must yield the same chunks every time."


def top_units(score_slabs: ScoreSlabs, k: int, largest: bool = True, seed: int = 0) -> Tensor:
    """The `k` units with the largest (or smallest) scores; -0.0 ties with 0.0.

    Where equal scores are more than the places left for them, a draw over all of them decides: each unit has the
    priority `tie_priority(seed, unit)`, and the highest win. So every set of tied units is equally likely over seeds,
    the answer is the same on every rank, device and dtype that finds the same ties, and a larger `k` takes the units of
    a smaller one and more. Seed it with `stream_seed(seed, module_name)`: with one seed for all, layers of one shape
    would draw alike.

    Scores: bf16, fp16, fp32 or fp64, any sign, infinities allowed, all chunks of one dtype; a long
    chunk is split here. Memory: one chunk and `O(k)`; a draw takes two passes more, and 1/2048 of the tied scores. The
    answer does not depend on how the scores are chunked.

    Returns sorted distinct units `[k]` on the scores' device, int32 (int64 from 2**31 units on).

    Raises:
        ValueError: NaN scores, `k` outside `0 .. number of scores`, scores that are not 1-D floats, chunks of
            different dtypes, a one-shot iterator, or chunks that change between two passes.
    """
    source = Source("", rereadable(score_slabs), seed)
    cut = find_cut([source], k, largest)
    units = selected(source, cut, largest)
    if units.numel() != k:
        raise ValueError(_CHANGED)
    return units


@dataclass(frozen=True)
class Source:
    """The scores of one layer, as a selection reads them."""

    name: str
    """For errors; may be empty."""
    chunks: Callable[[], Iterable[Tensor]]
    """Starts a fresh pass over the scores, in unit order."""
    seed: int = 0
    """Decides ties, see `tie_priority`."""
    units: Tensor | None = None
    """The unit of each score, sorted; None: the n-th score is unit n's."""

    def tied(self, key: int, largest: bool) -> Iterator[Tensor]:
        """The priorities of the units whose score has the key `key`, chunk by chunk."""
        start = 0
        for chunk in _pieces(self.chunks()):
            at = (_keys(chunk, largest) == key).nonzero().squeeze(1)
            if at.numel():
                yield self.priorities(at, start)
            start += chunk.numel()

    def priorities(self, at: Tensor, start: int) -> Tensor:
        """Priorities of the units at places `at` of a chunk that begins with the score number `start`."""
        places = at + start
        return tie_priority(self.seed, places if self.units is None else self.units[places])


def chunk_size(device: torch.device) -> int:
    """Scores handled at once on `device`. On a CPU their fp32 bits and keys stay in the second-level cache (2**19 at
    once took 3 times as long on 45M scores); an accelerator wants fewer, larger kernels."""
    return _CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK


@dataclass(frozen=True)
class Cut:
    """Where a selection of k units ends."""

    key: int | None
    """Scores with a larger key are in (`_keys`); None: nothing is."""
    ties: int
    """How many of the units whose score has the key `key` are in: those with the highest priorities."""
    priority: int | None
    """The lowest priority among them; None: all units with that key are in."""
    total: int
    """Scores in all."""
    device: torch.device

    def mask(self, source: Source, keys: Tensor, start: int) -> Tensor:
        """Which of a chunk's units are in; the chunk begins with the score number `start` of `source`."""
        if self.key is None:
            return torch.zeros_like(keys, dtype=torch.bool)
        if self.priority is None:
            return keys >= self.key
        mask = keys > self.key
        at = (keys == self.key).nonzero().squeeze(1)
        mask[at] = source.priorities(at, start) >= self.priority
        return mask


def find_cut(sources: list[Source], k: int, largest: bool = True, finite: bool = False, draw: bool = True) -> Cut:
    """The cut of the `k` best scores of all `sources` together. `finite` refuses scores of plus infinity; `draw=False`
    leaves it open which of the tied units are in.

    Memory: one chunk, 2,048 counters, and 1/2048 of the scores that tie at the cut. Raises `ValueError` as `top_units`
    does, naming the source where it has one.
    """
    prefix, remaining, dtype, total, device = 0, k, None, 0, torch.device("cpu")
    widths: tuple[int, ...] = ()
    level, shift, tied = 0, 0, 0
    while level == 0 or level < len(widths):
        counts: dict[torch.device, Tensor] = {}
        for source in sources:
            for chunk in _pieces(source.chunks()):
                if level == 0:
                    dtype = _check_chunk(chunk, dtype, source.name, finite)
                    widths = _DIGITS[torch.iinfo(_BITS[dtype]).bits]
                    shift = sum(widths) - widths[0]
                    total, device = total + chunk.numel(), chunk.device
                keys = _keys(chunk, largest)
                bins = 1 << widths[level]
                if level == 0:
                    digits = (keys >> shift).to(torch.int32).add_(bins // 2)
                else:
                    digits = keys[(keys >> (shift + widths[level])) == prefix]
                    digits = (digits >> shift).bitwise_and_(bins - 1)
                part = torch.bincount(digits, minlength=bins)
                counts[chunk.device] = counts[chunk.device].add_(part) if chunk.device in counts else part
        if level == 0:
            if not 0 <= k <= total:
                raise ValueError(f"k={k} units asked of {total} scores: k must be between 0 and {total}.")
            if k == 0:
                return Cut(None, 0, None, total, device)
        bins = 1 << widths[level]
        digit, remaining, tied = _digit(counts, bins, remaining)
        prefix = digit - bins // 2 if level == 0 else (prefix << widths[level]) | digit
        level += 1
        shift -= widths[level] if level < len(widths) else 0
    priority = lowest_priority(sources, prefix, remaining, largest) if draw and remaining < tied else None
    return Cut(prefix, remaining, priority, total, device)


def score_at(sources: list[Source], k: int) -> float:
    """The `k`-th largest score of all `sources` together, 1 the largest. Raises `ValueError` as `find_cut`."""
    if k < 1:
        raise ValueError(f"k={k}: the largest score is number 1.")
    cut = find_cut(sources, k, draw=False)
    dtype = next(chunk.dtype for source in sources for chunk in _pieces(source.chunks()))
    key = torch.tensor([cut.key], dtype=_BITS[dtype])
    info = torch.iinfo(key.dtype)
    # What `_keys` does to bits undoes itself.
    bits = (key >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(key)
    return float(bits.view(dtype))


def _digit(counts: dict[torch.device, Tensor], bins: int, wanted: int) -> tuple[int, int, int]:
    """The bin, from the top, that the `wanted`-th key falls into; its rank in there, and how many keys are in there."""
    histogram = sum((part.cpu() for part in counts.values()), torch.zeros(bins, dtype=torch.int64))
    from_top = histogram.flip(0).cumsum(0)
    step = int(torch.searchsorted(from_top, wanted))
    if step >= bins:
        raise ValueError(_CHANGED)
    digit = bins - 1 - step
    return digit, wanted - (int(from_top[step]) - int(histogram[digit])), int(histogram[digit])


def lowest_priority(sources: list[Source], key: int, count: int, largest: bool = True) -> int:
    """The `count`-th highest priority among the units whose score has the key `key`."""
    bins, shift = 2048, 53
    counts: dict[torch.device, Tensor] = {}
    for source in sources:
        for priorities in source.tied(key, largest):
            part = torch.bincount((priorities >> shift) + bins // 2, minlength=bins)
            device = part.device
            counts[device] = counts[device].add_(part) if device in counts else part
    digit, count, _ = _digit(counts, bins, count)
    inside = [p[(p >> shift) + bins // 2 == digit].cpu() for source in sources for p in source.tied(key, largest)]
    return int(torch.cat(inside).sort(descending=True).values[count - 1])


def selected(source: Source, cut: Cut, largest: bool = True) -> Tensor:
    """The sorted units of `source` that are within `cut`, `[n]` on the scores' device, int32 (int64 from 2**31 on)."""
    found, start = [], 0
    dtype = torch.int32 if cut.total < 2**31 else torch.int64
    for chunk in _pieces(source.chunks()):
        places = cut.mask(source, _keys(chunk, largest), start).nonzero().squeeze(1).add_(start)
        found.append((places if source.units is None else source.units[places]).to(dtype))
        start += chunk.numel()
    return torch.cat(found) if found else torch.empty(0, dtype=dtype, device=cut.device)


def count_selected(source: Source, cut: Cut, largest: bool = True) -> tuple[int, int]:
    """How many scores of `source` are within `cut`, and how many there are."""
    inside = seen = 0
    for chunk in _pieces(source.chunks()):
        inside += int(cut.mask(source, _keys(chunk, largest), seen).sum())
        seen += chunk.numel()
    return inside, seen


def tie_priority(seed: int, units: Tensor) -> Tensor:
    r"""A fixed random int64 for every unit: the output number `unit` of SplitMix64 (Steele et al., 2014) started at
    `seed`; all units of one seed differ.

    A hash and not a stream: it does not depend on which units are asked for, in which order or on which device.
    """
    signed = (seed + 2**63) % 2**64 - 2**63  # any integer, modulo 2**64
    z = (units.long() + 1) * _GOLDEN + signed
    z = (z ^ _shifted(z, 30)) * _MIX_1
    z = (z ^ _shifted(z, 27)) * _MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    # Signed integers fill with the sign; the mask leaves what an unsigned shift would.
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def rereadable(score_slabs: ScoreSlabs) -> Callable[[], Iterable[Tensor]]:
    """`score_slabs` as a callable that starts a fresh pass over its chunks.

    Raises:
        ValueError: a one-shot iterator, which a second pass would find empty.
    """
    if isinstance(score_slabs, Tensor):
        return lambda: iter((score_slabs,))
    if callable(score_slabs):
        return score_slabs
    if isinstance(score_slabs, Iterator):
        raise ValueError(
            "The scores are read several times, and an iterator can be read once. Pass a callable that returns a "
            "fresh iterator (`lambda: (score(c) for c in chunks)`), a list of chunks, or one tensor."
        )
    return lambda: iter(score_slabs)


def random_units(num_units: int, k: int, generator: torch.Generator) -> Tensor:
    """`k` distinct units of `num_units`, every such set equally likely. Sorted, int32 (int64 from 2**31 units on).

    Draws with replacement and redraws what fell on a taken unit, in `O(k)` memory; only where more than one unit in 32
    is asked for does it keep one byte a unit. Lives on the generator's device and never touches the global RNG.

    Raises:
        ValueError: `k` outside `0 .. num_units`, or no generator.
    """
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator={generator!r} must be a torch.Generator: the global RNG differs between ranks. "
            f"Seed one with stream_seed(seed, step, module_name)."
        )
    if not 0 <= k <= num_units:
        raise ValueError(f"k={k} units asked of {num_units}: k must be between 0 and {num_units}.")
    dtype = torch.int32 if num_units < 2**31 else torch.int64
    device = generator.device
    if k * 32 < num_units:
        units = torch.empty(0, dtype=torch.int64, device=device)
        while units.numel() < k:
            drawn = _draw(num_units, k - units.numel(), generator)
            units = torch.cat((units, drawn)).unique()
        return units.to(dtype)
    few = min(k, num_units - k)
    mask = torch.zeros(num_units, dtype=torch.bool, device=device)
    have = 0
    while have < few:
        mask[_draw(num_units, few - have, generator)] = True
        have = int(mask.sum())
    if few != k:
        mask.logical_not_()
    return mask.nonzero().squeeze(1).to(dtype)


def excluding(chunks: Callable[[], Iterable[Tensor]], taken: Tensor) -> Callable[[], Iterator[Tensor]]:
    """`chunks` with the scores of the units `taken` (sorted, distinct) at minus infinity, written into each chunk.

    `top_units` of the result takes none of them as long as it is asked for no more than the other units.
    """

    def masked() -> Iterator[Tensor]:
        start = 0
        for chunk in chunks():
            bounds = torch.tensor([start, start + chunk.numel()], device=taken.device, dtype=taken.dtype)
            low, high = torch.searchsorted(taken, bounds).tolist()
            chunk[taken[low:high].long() - start] = -torch.inf
            start += chunk.numel()
            yield chunk

    return masked


def random_units_outside(num_units: int, taken: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """`k` distinct units of `num_units` that are not in `taken` (sorted, distinct), every such set equally likely.

    Sorted, of `taken`'s dtype and device, in `O(k + len(taken))` memory. Raises `ValueError` as `random_units` does.
    """
    rank = random_units(num_units - taken.numel(), k, generator).to(taken.device).long()
    # Before the i-th taken unit lie `taken[i] - i` free ones.
    free_before = taken.long() - torch.arange(taken.numel(), device=taken.device)
    return (rank + torch.searchsorted(free_before, rank, right=True)).to(taken.dtype)


def stream_seed(seed: int, *parts: str | int) -> int:
    """A seed for `torch.Generator().manual_seed` from a base seed and what the stream is for, e.g. step and module
    name.

    The first 63 bits of a SHA-256 over the typed, length-prefixed parts: the same in every process and on every
    machine (Python's own `hash` of a string is not), and different for `("a", "bc")` and `("ab", "c")`, or `1` and
    `"1"`.

    Raises:
        ValueError: a part that is neither str nor int.
    """
    digest = hashlib.sha256()
    for part in (seed, *parts):
        if not isinstance(part, (str, int)):
            raise ValueError(f"stream_seed takes str and int parts, got {part!r} of {type(part).__name__}.")
        text = (part if isinstance(part, str) else str(int(part))).encode()
        digest.update(b"%s%d:" % (b"s" if isinstance(part, str) else b"i", len(text)) + text)
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def _draw(num_units: int, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` uniform draws. A power of two as the range, because torch.randint is a remainder: for 45M units
    out of 2**32 its small results would be 1 % likelier than its large ones."""
    span = 1 << (num_units - 1).bit_length()
    drawn = torch.randint(span, (-(-count * span // num_units),), generator=generator, device=generator.device)
    return drawn if span == num_units else drawn[drawn < num_units][:count]


def _pieces(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk in chunks:
        if chunk.ndim != 1:
            raise ValueError(f"Scores must be 1-D chunks, got shape {tuple(chunk.shape)}. Flatten them first.")
        if chunk.numel():
            yield from chunk.detach().split(chunk_size(chunk.device))


def _check_chunk(chunk: Tensor, dtype: torch.dtype | None, name: str, finite: bool) -> torch.dtype:
    where = f" of '{name}'" if name else ""
    if chunk.dtype not in _BITS:
        raise ValueError(f"Scores{where} must be bf16, fp16, fp32 or fp64, got {chunk.dtype}.")
    if dtype is not None and chunk.dtype != dtype:
        raise ValueError(f"Scores{where} are {chunk.dtype} after chunks of {dtype}: all chunks must have one dtype.")
    most = float(chunk.max())  # max passes NaN on, at a third of the cost of isnan().any()
    if math.isnan(most):
        raise ValueError(f"Scores{where} contain NaN, which has no rank. Look for NaN in the weights or the gradients.")
    if finite and most == math.inf:
        raise ValueError(
            f"Scores{where} contain infinity, which would be chosen before everything else. Look for infinite or "
            "overflowing numbers in the weights; under fp16 use bf16 or fp32."
        )
    return chunk.dtype


def _keys(chunk: Tensor, largest: bool) -> Tensor:
    """Signed integers in the order of the scores: a negative float's magnitude bits count backwards."""
    kind = _BITS[chunk.dtype]
    bits = (chunk + 0.0).view(kind)  # -0.0 + 0.0 is +0.0
    info = torch.iinfo(kind)
    keys = (bits >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(bits)
    return keys if largest else keys.bitwise_not_()
