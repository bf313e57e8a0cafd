r"""Exact selection of the best units, and of random ones, in memory of one chunk plus the answer.

`torch.topk` and `torch.sort` over all scores of a layer cost an int64 index per score; `torch.quantile` refuses more
than 2**24 of them. Here the bits of a float score are read as an integer key of the same order, its k-th largest value
is found by counting 8 to 11 of its bits at a time (two passes over 16-bit scores, three over fp32), and one more pass
collects.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator

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


def top_units(score_slabs: ScoreSlabs, k: int, largest: bool = True) -> Tensor:
    """The `k` units with the largest (or smallest) scores, ties to the lowest unit number; -0.0 ties with 0.0.

    Scores: bf16, fp16, fp32 or fp64, any sign, infinities allowed, all chunks of one dtype; a long
    chunk is split here. Memory: one chunk and `O(k)`. The answer does not depend on how the scores are chunked.

    Returns sorted distinct units `[k]` on the scores' device, int32 (int64 from 2**31 units on).

    Raises:
        ValueError: NaN scores, `k` outside `0 .. number of scores`, scores that are not 1-D floats, chunks of
            different dtypes, a one-shot iterator, or chunks that change between two passes.
    """
    chunks = rereadable(score_slabs)
    cut = find_cut([("", chunks)], k, largest)
    dtype = torch.int32 if cut.total < 2**31 else torch.int64
    if k == 0:
        return torch.empty(0, dtype=dtype, device=cut.device)
    found, ties, start = [], cut.ties, 0
    for chunk in _pieces(chunks()):
        keys = _keys(chunk, largest)
        mask = keys > cut.key
        if ties:
            tied = (keys == cut.key).nonzero().squeeze(1)[:ties]
            mask[tied] = True
            ties -= tied.numel()
        found.append(mask.nonzero().squeeze(1).add_(start).to(dtype))
        start += chunk.numel()
    units = torch.cat(found)
    if start != cut.total or units.numel() != k:
        raise ValueError("The scores changed between two passes: the callable must yield the same chunks every time.")
    return units


def chunk_size(device: torch.device) -> int:
    """Scores handled at once on `device`. On a CPU their fp32 bits and keys stay in the second-level cache (2**19 at
    once took 3 times as long on 45M scores); an accelerator wants fewer, larger kernels."""
    return _CPU_CHUNK if device.type == "cpu" else _ACCELERATOR_CHUNK


class Cut:
    """Where a selection of k units ends: every score with a larger key, and the first `ties` scores with key `key`."""

    __slots__ = ("device", "key", "ties", "total")

    def __init__(self, key: int, ties: int, total: int, device: torch.device):
        self.key, self.ties, self.total, self.device = key, ties, total, device


def find_cut(sources: list[tuple[str, Callable[[], Iterable[Tensor]]]], k: int, largest: bool = True) -> Cut:
    """The cut of the `k` best scores of all `sources` (name, re-readable chunks) taken one after the other.

    Memory: one chunk and 2,048 counters. Raises `ValueError` as `top_units` does, naming the source where it has one.
    """
    prefix, remaining, dtype, total, device = 0, k, None, 0, torch.device("cpu")
    widths: tuple[int, ...] = ()
    level, shift = 0, 0
    while level == 0 or level < len(widths):
        counts: dict[torch.device, Tensor] = {}
        for name, chunks in sources:
            for chunk in _pieces(chunks()):
                if level == 0:
                    dtype = _check_chunk(chunk, dtype, name)
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
                return Cut(0, 0, total, device)
        bins = 1 << widths[level]
        histogram = sum((part.cpu() for part in counts.values()), torch.zeros(bins, dtype=torch.int64))
        from_top = histogram.flip(0).cumsum(0)
        step = int(torch.searchsorted(from_top, remaining))
        if step >= bins:
            raise ValueError(
                "The scores changed between two passes: the callable must yield the same chunks every time."
            )
        digit = bins - 1 - step
        remaining -= int(from_top[step]) - int(histogram[digit])
        prefix = digit - bins // 2 if level == 0 else (prefix << widths[level]) | digit
        level += 1
        shift -= widths[level] if level < len(widths) else 0
    return Cut(prefix, remaining, total, device)


def count_selected(chunks: Callable[[], Iterable[Tensor]], cut: Cut, largest: bool = True) -> tuple[int, int, int]:
    """How many scores lie above `cut`, how many exactly on it, and how many there are."""
    above = tied = seen = 0
    for chunk in _pieces(chunks()):
        keys = _keys(chunk, largest)
        above += int((keys > cut.key).sum())
        tied += int((keys == cut.key).sum())
        seen += chunk.numel()
    return above, tied, seen


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


def _check_chunk(chunk: Tensor, dtype: torch.dtype | None, name: str) -> torch.dtype:
    where = f" of '{name}'" if name else ""
    if chunk.dtype not in _BITS:
        raise ValueError(f"Scores{where} must be bf16, fp16, fp32 or fp64, got {chunk.dtype}.")
    if dtype is not None and chunk.dtype != dtype:
        raise ValueError(f"Scores{where} are {chunk.dtype} after chunks of {dtype}: all chunks must have one dtype.")
    if math.isnan(chunk.max()):  # max passes NaN on, at a third of the cost of isnan().any()
        raise ValueError(f"Scores{where} contain NaN, which has no rank. Look for NaN in the weights or the gradients.")
    return chunk.dtype


def _keys(chunk: Tensor, largest: bool) -> Tensor:
    """Signed integers in the order of the scores: a negative float's magnitude bits count backwards."""
    kind = _BITS[chunk.dtype]
    bits = (chunk + 0.0).view(kind)  # -0.0 + 0.0 is +0.0
    info = torch.iinfo(kind)
    keys = (bits >> (info.bits - 1)).bitwise_and_(info.max).bitwise_xor_(bits)
    return keys if largest else keys.bitwise_not_()
