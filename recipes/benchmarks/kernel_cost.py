"""What a gradient at the support costs: Triton kernels, torch, and the dense gradient, at the shapes of Llama-3.2-3B.

    python recipes/benchmarks/kernel_cost.py                              # GPU if there is one: 4 x 768 tokens, bf16
    python recipes/benchmarks/kernel_cost.py --dtype fp32 --densities 0.01 0.05
    python recipes/benchmarks/kernel_cost.py --device cpu --tokens 256    # torch paths only, and it says so

Ways take turns: a round times each of them once, and figures are medians over rounds. On a GPU the L2 cache is
overwritten before every timing, as the rest of a training step would. The last lines give the density at which entries
should change from the sampled product to dense-and-gather, which is what `SAMPLED_DENSITY` in
`hf_sparse_peft/ops/triton_kernels.py` is to be set to, and the largest error of the kernels against float64. Rows go to
`kernel_cost.json` in `--output`; those measured on this machine, with this source, are not measured again.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from harness import Column, Options, Rows, option, parse, print_table

from hf_sparse_peft.ops import triton_kernels, unit_gradient

# (rows, cols) of the linear layers of Llama-3.2-3B; what the layers are called there.
SHAPES = {"q, o": (3072, 3072), "k, v": (1024, 3072), "gate, up": (8192, 3072), "down": (3072, 8192)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WAYS = ("dense", "torch", "triton")
Way = Callable[[], torch.Tensor]


@dataclass
class KernelOptions(Options):
    """Options of this benchmark."""

    dtype: Literal["bf16", "fp16", "fp32"] = option("bf16", "of gradients and inputs")
    tokens: int = option(4 * 768, "rows of both")
    rounds: int = option(9, "timings of each way")
    densities: list[float] = option([0.001, 0.002, 0.005, 0.01, 0.02, 0.05], "fractions of the weight's units")
    blocks: list[int] = option([0, *sorted(triton_kernels.BLOCK_WARPS)], "sides of a unit; 0: entries")


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(KernelOptions, __doc__, argv)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    setting = {name: getattr(options, name) for name in ("dtype", "tokens", "rounds")}
    rows = Rows(options, "kernel_cost", setting, timed=True)
    kernels = device.type == "cuda" and triton_kernels.available(torch.empty(0, device=device))
    if not kernels:
        print("No Triton kernel runs here (that takes a CUDA GPU and the extra `gpu`): GPU figures are missing below.")
    found = []
    for layer, shape in SHAPES.items():
        generator = torch.Generator(device).manual_seed(0)
        dy, x = (torch.randn(options.tokens, n, generator=generator, device=device).to(dtype) for n in shape)
        for size, density in itertools.product(options.blocks, options.densities):
            work = partial(measure, dy, x, size, density, options.rounds, kernels)
            found.append(rows.measure(work, layer=layer, block_size=size, density=density))
    print_table(f"gradient at the support, {options.tokens} tokens, {options.dtype}", COLUMNS, found)
    if kernels:
        verdict(found)
    else:
        print("Crossover of the Triton kernels: not measured, there is no GPU. SAMPLED_DENSITY stays what it is.")


def measure(dy: torch.Tensor, x: torch.Tensor, size: int, density: float, rounds: int, kernels: bool) -> dict[str, Any]:
    """Median milliseconds and peak MiB of each way to one support's gradient, and the kernel's error."""
    total = dy.shape[1] * x.shape[1] // (size * size or 1)
    generator = torch.Generator(dy.device).manual_seed(0)
    drawn = torch.randperm(total, generator=generator, device=dy.device)[: max(1, round(density * total))]
    units = drawn.sort().values.int()

    def without_triton() -> torch.Tensor:
        with mock.patch.dict(os.environ, HF_SPARSE_PEFT_TRITON="0"):
            return unit_gradient(dy, x, units, "block" if size else "entry", size)

    ways: dict[str, Way] = {"dense": lambda: dy.t() @ x, "torch": without_triton}
    if kernels and size:
        ways["triton"] = lambda: triton_kernels.block_gradient(dy, x, units, size)
    elif kernels:
        ways["triton"] = lambda: triton_kernels.entry_gradient(dy, x, units)
    timer = _gpu_timer(dy.device) if dy.is_cuda else _cpu_ms
    taken = [{name: timer(way) for name, way in ways.items()} for _ in range(rounds + 1)][1:]  # the first compiles
    row = {f"{name}_ms": statistics.median(times[name] for times in taken) for name in ways}
    if dy.is_cuda:
        row |= {f"{name}_mib": _peak_mib(way) for name, way in ways.items()}
    if kernels:
        row["error"] = kernel_error(ways["triton"](), dy, x, units, size)
    return row


def _cpu_ms(way: Way) -> float:
    start = time.perf_counter()
    way()
    return (time.perf_counter() - start) * 1e3


def _gpu_timer(device: torch.device) -> Callable[[Way], float]:
    flush = torch.empty(1 << 30, dtype=torch.uint8, device=device)

    def milliseconds(way: Way) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # empties L2, and keeps the GPU busy while the CPU enqueues what is timed
        start.record()
        way()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return milliseconds


def _peak_mib(way: Way) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernel_error(got: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, units: torch.Tensor, size: int) -> float:
    """Largest error of the first 64 units against float64, over the largest gradient among them."""
    got, units = got[:64].double(), units[:64].long()
    per_row, size = x.shape[1] // (size or 1), size or 1
    inner = torch.arange(size, device=x.device)
    left = dy[:, (units // per_row * size)[:, None] + inner].double()  # [tokens, k, b]
    right = x[:, (units % per_row * size)[:, None] + inner].double()
    expected = torch.einsum("tkb,tkc->kbc", left, right)
    return ((got.view_as(expected) - expected).abs().max() / expected.abs().max()).item()


COLUMNS = (
    Column("layer", "layer"),
    Column("unit", lambda row: f"block {row['block_size']}" if row["block_size"] else "entry"),
    Column("density", "density", "{:.1%}"),
    *(Column(f"{way} ms", f"{way}_ms", "{:.3f}") for way in WAYS),
    Column("torch / dense", lambda row: row["torch_ms"] / row["dense_ms"], "{:.2f}"),
    *(Column(f"{way} MiB", f"{way}_mib", "{:.1f}") for way in WAYS),
)


def crossover(points: list[tuple[float, float]]) -> str:
    """Density at which a ratio of times, given as (density, ratio), passes 1; straight between points on log scales."""
    points = sorted(points)
    if points[0][1] >= 1:
        return f"below {points[0][0]:.2%}"
    for (low, fast), (high, slow) in itertools.pairwise(points):
        if slow >= 1:
            share = math.log(1 / fast) / math.log(slow / fast)
            return f"{math.exp(math.log(low) + share * math.log(high / low)):.2%}"
    return f"above {points[-1][0]:.2%}"


def verdict(found: list[dict[str, Any]]) -> None:
    """The crossovers, and the errors."""
    for size, layer in dict.fromkeys((row["block_size"], row["layer"]) for row in found):
        rows = [row for row in found if (row["block_size"], row["layer"]) == (size, layer)]
        density = crossover([(row["density"], row["triton_ms"] / row["torch_ms"]) for row in rows])
        unit = f"block {size}" if size else "entry"
        print(f"{unit:<9} {layer:<9} Triton is faster than torch up to density: {density}")
    print(f"largest error of a kernel against float64, relative: {max(row['error'] for row in found):.1e}")


if __name__ == "__main__":
    main()
