"""Gradients at the support, for `gpu.py`: are they right, what does each way to them cost, and where do ways cross?

Ways take turns: a round times each of them once, and figures are medians over rounds. On a GPU the L2 cache is
overwritten before every timing, as the rest of a training step would.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hf_sparse_peft.ops import DenseSource, EntryIndex, Plan, sparse_linear, triton_kernels, unit_gradient
from hf_sparse_peft.ops.entries import live_lines
from hf_sparse_peft.ops.subgrid import take_columns
from hf_sparse_peft.ops.units import compacted_gradient

# (rows, cols) of the projections of Llama 3.2 3B, Llama 3.1 8B, Llama 3.2 1B.
SHAPES = {
    "3B": {"q, o": (3072, 3072), "k, v": (1024, 3072), "gate, up": (8192, 3072), "down": (3072, 8192)},
    "8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "1B": {"q, o": (2048, 2048), "k, v": (512, 2048), "gate, up": (8192, 2048), "down": (2048, 8192)},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BLOCKS = (16, 32, 64, 128, 256)
ERRORS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}
"""What a result may differ from float64, over the largest number of it: sums of fp32, and a few roundings of the output
where torch's products round (cuBLAS may add partial sums in 16 bits)."""
Way = Callable[[], Tensor]


@dataclass(frozen=True)
class Unit:
    """How a weight is cut, and of which sub-grid of it units are drawn (`share` of its rows and of its columns)."""

    granularity: str
    size: int = 0
    share: float = 1.0

    def __str__(self) -> str:
        grid = "" if self.share == 1 else f" in {self.share:g} x {self.share:g}"
        return f"{self.granularity}{self.size or ''}{grid}"

    def total(self, rows: int, cols: int) -> int:
        """How many there are in the weight."""
        return {"entry": rows * cols, "row": rows, "column": cols}.get(
            self.granularity, rows * cols // max(1, self.size) ** 2
        )

    def draw(self, rows: int, cols: int, count: int, generator: torch.Generator) -> Tensor:
        """`count` units, sorted, int32."""
        device = generator.device
        if self.share == 1:
            drawn = torch.randperm(self.total(rows, cols), generator=generator, device=device)[:count]
            return drawn.sort().values.int()
        left, right = (self._lines(side, generator) for side in (rows, cols))
        inside = torch.randperm(left.numel() * right.numel(), generator=generator, device=device)[:count].sort().values
        return (left[inside // right.numel()] * cols + right[inside % right.numel()]).int()

    def _lines(self, side: int, generator: torch.Generator) -> Tensor:
        count = max(1, round(self.share * side))
        return torch.randperm(side, generator=generator, device=generator.device)[:count].sort().values


UNITS = {
    Unit("entry"): (0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    Unit("entry", share=0.25): (0.001, 0.002, 0.005, 0.01, 0.02, 0.05),
    Unit("entry", share=0.5): (0.002, 0.005, 0.01, 0.05),
    **{Unit("block", size): (0.002, 0.01, 0.05) for size in BLOCKS},
    Unit("row"): (0.01, 0.05),
    Unit("column"): (0.01, 0.05),
}
"""Which supports are timed, at which shares of the weight."""


def kernels_run(device: torch.device) -> bool:
    """Whether a Triton kernel can be started there, or is interpreted."""
    return triton_kernels.available(torch.empty(0, device=device))


# Right or wrong


def check_unit(unit: Unit, dtype: str, device: torch.device, large: bool) -> dict[str, Any]:
    """Everything that training asks of a support against float64, on odd shapes and (`large`) a real one, with no unit,
    one, some, and all of them: the gradient at it, the kernel by itself, and a layer's output and input gradient."""
    worst: dict[str, float] = {}
    cases = 0
    for tokens, rows, cols in _shapes(unit.size, large):
        generator = torch.Generator(device).manual_seed(cases)
        draw = functools.partial(torch.randn, generator=generator, device=device)
        dy, x, weight = (draw(*shape).to(DTYPES[dtype]) for shape in ((tokens, rows), (tokens, cols), (rows, cols)))
        total = unit.total(rows, cols)
        for count in sorted({0, 1, -(-total // 50), *([] if large else [total])}):
            units = unit.draw(rows, cols, count, generator)
            for part, error in _errors(unit, dy, x, weight, units).items():
                worst[part] = max(error, worst.get(part, 0.0))
            cases += 1
    wide = {part: error for part, error in worst.items() if not error <= ERRORS["fp32" if part == "kernel" else dtype]}
    return {"cases": cases, "errors": worst, "right": not wide, **({"wrong": sorted(wide)} if wide else {})}


def _shapes(size: int, large: bool) -> tuple[tuple[int, int, int], ...]:
    if large:
        return ((1536, 2048, 3072),)
    if size:
        return ((37, 2 * size, 3 * size), (1025, size, 2 * size)) if size <= 32 else ((70, 2 * size, size),)
    return (37, 19, 13), (1, 1, 33), (300, 64, 90)


def _errors(unit: Unit, dy: Tensor, x: Tensor, weight: Tensor, units: Tensor) -> dict[str, float]:
    """Largest error of each result, over the largest number of the float64 one."""
    rows, cols = dy.shape[1], x.shape[1]
    dense = dy.double().t() @ x.double()
    expected = _read(dense, units, unit)
    errors = {}
    operands = {"units": units}
    if unit.granularity == "subnet":
        operands = {}
    else:
        errors["gradient"] = _error(unit_gradient(dy, x, units, unit.granularity, unit.size), expected)
    if unit.granularity == "subnet" or unit.share < 1:
        operands |= dict(zip(("live_rows", "live_columns"), live_lines(units, rows, cols), strict=True))
    if kernels_run(x.device) and unit.granularity == "entry":
        errors["kernel"] = _error(triton_kernels.entry_gradient(dy, x, units), expected)
    if kernels_run(x.device) and unit.size in triton_kernels.BLOCK_WARPS:
        errors["kernel"] = _error(triton_kernels.block_gradient(dy, x, units, unit.size), expected)
    values = 0.1 * torch.ones_like(expected, dtype=torch.float32)
    delta = torch.zeros(rows, cols, dtype=torch.float64, device=x.device)
    delta.index_put_(_positions(units, rows, cols, unit), values.double())
    plan = Plan(rows, cols, x.dtype, DenseSource(weight), unit.granularity, unit.size)
    inputs = x.clone().requires_grad_(), values.requires_grad_()
    y = sparse_linear(inputs[0], plan, values=inputs[1], **operands)
    y.backward(dy)
    total = weight.double() + delta
    errors["output"] = _error(y.detach(), x.double() @ total.t())
    errors["input gradient"] = _error(inputs[0].grad, dy.double() @ total)
    errors["layer's gradient"] = _error(inputs[1].grad, expected)
    return errors


def _positions(units: Tensor, rows: int, cols: int, unit: Unit) -> tuple[Tensor, Tensor]:
    """Rows and columns of every number of `units`, in the layout of their values."""
    at, device = units.long(), units.device
    if unit.granularity == "row":
        return at[:, None], torch.arange(cols, device=device)
    if unit.granularity == "column":
        return torch.arange(rows, device=device), at[:, None]
    if unit.granularity == "entry":
        return at // cols, at % cols
    if unit.granularity == "subnet":  # all rows x all columns of the units
        down, across = live_lines(at, rows, cols)
        return down.long()[:, None], across.long()
    inner, per_row = torch.arange(unit.size, device=device), cols // unit.size
    down, across = (at // per_row * unit.size)[:, None, None], (at % per_row * unit.size)[:, None, None]
    return down + inner[:, None], across + inner


def _read(dense: Tensor, units: Tensor, unit: Unit) -> Tensor:
    return dense[_positions(units, *dense.shape, unit)]


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or not got.isfinite().all():
        return math.inf
    return 0.0 if not got.numel() else ((got.double() - expected).abs().max() / expected.abs().max()).item()


# What it costs


def measure_projection(
    shape: tuple[int, int], tokens: int, dtype: str, units: dict[Unit, tuple[float, ...]], rounds: int,
    device: torch.device, in_time: Callable[[], bool],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Milliseconds and MiB of each way to the gradient at each support of one projection, until time is up."""
    generator = torch.Generator(device).manual_seed(0)
    dy, x = (torch.randn(tokens, n, generator=generator, device=device).to(DTYPES[dtype]) for n in shape)
    points = {}
    for unit, density in ((unit, density) for unit, densities in units.items() for density in densities):
        count = max(1, round(density * unit.total(*shape)))
        if unit.size and any(side % unit.size for side in shape):
            continue
        if not in_time():
            break
        drawn = unit.draw(*shape, count, generator)
        figures = _time_ways(dict(_ways(unit, dy, x, drawn)), rounds, device)
        points[f"{unit} {density:.1%}"] = {"unit": str(unit), "density": density, "count": count, **figures}
    return points


def _ways(unit: Unit, dy: Tensor, x: Tensor, units: Tensor) -> Iterator[tuple[str, Way]]:
    """Every way that there is, by name: `ours` is the one that a layer takes."""
    rows, cols, of_entries = dy.shape[1], x.shape[1], unit.granularity == "entry"
    lines = live_lines(units, rows, cols) if unit.share < 1 else ()

    def index() -> EntryIndex:  # a new one for every product, as in a layer
        return EntryIndex(units, None, rows, cols, *lines)

    def ours() -> Tensor:
        return unit_gradient(dy, x, index() if of_entries else units, unit.granularity, unit.size)

    def without_kernels() -> Tensor:
        with mock.patch.dict(os.environ, HF_SPARSE_PEFT_TRITON="0"):
            return ours()

    yield "dense", lambda: (dy.t() @ x).view(-1).index_select(0, units) if of_entries else dy.t() @ x
    yield "ours", ours
    if kernels_run(x.device) and of_entries:
        yield "torch", without_kernels
        yield "sampled", lambda: triton_kernels.entry_gradient(dy, x, index().flat)
    if kernels_run(x.device) and unit.size in triton_kernels.BLOCK_WARPS:
        yield "torch", without_kernels
        yield "kernel", lambda: triton_kernels.block_gradient(dy, x, units, unit.size)
    if lines:
        yield "compacted", lambda: compacted_gradient(take_columns(dy, lines[0]), take_columns(x, lines[1]), index())


def _time_ways(ways: dict[str, Way], rounds: int, device: torch.device) -> dict[str, Any]:
    timer = timer_of(device)
    taken = [{name: timer(way) for name, way in ways.items()} for _ in range(rounds + 1)][1:]  # the first compiles
    figures: dict[str, Any] = {"ms": {name: statistics.median(times[name] for times in taken) for name in ways}}
    if device.type == "cuda":
        figures["mib"] = {name: peak_mib(way) for name, way in ways.items()}
    return figures


def timer_of(device: torch.device) -> Callable[[Way], float]:
    """A function that gives the milliseconds of one call: of the GPU, or this process's CPU time."""
    return gpu_timer(device) if device.type == "cuda" else _cpu_milliseconds


def _cpu_milliseconds(way: Way) -> float:
    start = time.process_time()
    way()
    return (time.process_time() - start) * 1e3


@functools.cache
def gpu_timer(device: torch.device) -> Callable[[Way], float]:
    """A function that times one call on the GPU."""
    flush = torch.empty(1 << 29, dtype=torch.uint8, device=device)

    def milliseconds(way: Way) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # empties L2, and keeps the GPU busy while the CPU enqueues what is timed
        start.record()
        way()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


def peak_mib(way: Way) -> float:
    """Most memory that one call takes on the GPU."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


# Where ways cross


def crossover(points: list[tuple[float, float]]) -> tuple[float, str]:
    """Density at which a ratio of times, given as (density, ratio), passes 1, straight between points on log scales;
    and whether that is `at`, `below` or `above` the density returned."""
    points = sorted(points)
    if points[0][1] >= 1:
        return points[0][0], "below"
    for (low, fast), (high, slow) in itertools.pairwise(points):
        if slow >= 1:
            share = math.log(1 / fast) / math.log(slow / fast)
            return math.exp(math.log(low) + share * math.log(high / low)), "at"
    return points[-1][0], "above"


def crossovers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every projection, number of tokens and kind of support: up to which density each way beats the dense gradient
    (of which entries are gathered).

    A line has `model`, `layer`, `rows`, `cols`, `tokens`, `dtype`, `unit`, `way`, and `density` with `side` (`at`,
    `below`, `above`: the latter two where the ways do not cross among the densities that were measured).
    """
    found = []
    for row in rows:
        place = {name: row[name] for name in ("model", "layer", "rows", "cols", "tokens", "dtype")}
        for unit in dict.fromkeys(point["unit"] for point in row["points"].values()):
            points = [point for point in row["points"].values() if point["unit"] == unit]
            for way in points[0]["ms"].keys() - {"dense"}:
                ratios = [(point["density"], point["ms"][way] / point["ms"]["dense"]) for point in points]
                density, side = crossover(ratios)
                found.append({**place, "unit": unit, "way": way, "density": density, "side": side})
    return sorted(found, key=lambda line: (line["unit"], line["way"]))
