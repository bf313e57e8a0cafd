"""What a gradient at the support costs: Triton kernels, torch, and the dense gradient, at the shapes of Llama-3.2-3B.

    python recipes/benchmarks/kernel_cost.py                              # GPU if there is one: 4 x 768 tokens, bf16
    python recipes/benchmarks/kernel_cost.py --dtype fp32 --densities 0.01 0.05
    python recipes/benchmarks/kernel_cost.py --device cpu --tokens 256    # torch paths only, and it says so

Ways take turns: a round times each of them once, and figures are medians over rounds. On a GPU the L2 cache is
overwritten before every timing, as the rest of a training step would. The last lines give the density at which entries
should change from the sampled product to dense-and-gather, which is what `SAMPLED_DENSITY` in
`hf_sparse_peft/ops/triton_kernels.py` is to be set to, and the largest error of the kernels against float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from hf_sparse_peft.ops import triton_kernels, unit_gradient

# (rows, cols) of the linear layers of Llama-3.2-3B; what the layers are called there.
SHAPES = {"q, o": (3072, 3072), "k, v": (1024, 3072), "gate, up": (8192, 3072), "down": (3072, 8192)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DENSITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)

Ways = dict[str, Callable[[], torch.Tensor]]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write JSON where asked."""
    args = _arguments(argv)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{machine}, torch {torch.__version__}, {args.tokens} tokens, {args.dtype}, median of {args.rounds} rounds")
    probe = torch.empty(0, device=device)
    kernels = device.type == "cuda" and triton_kernels.available(probe)
    if not kernels:
        print("No Triton kernel runs here (that takes a CUDA GPU and the extra `gpu`): GPU figures are missing below.")
    results = []
    for layer, (rows, cols) in SHAPES.items():
        generator = torch.Generator(device).manual_seed(0)
        dy, x = (torch.randn(args.tokens, n, generator=generator, device=device).to(dtype) for n in (rows, cols))
        print(f"\n{layer}: {rows} x {cols}\n{'support':<18}{'way':<10}{'ms':>9}{'of dense':>10}{'peak MiB':>10}")
        for granularity, size in [("entry", 0), *(("block", size) for size in args.blocks)]:
            for density in args.densities:
                units = draw_units(rows, cols, density, size, generator)
                ways = ways_to(dy, x, units, granularity, size, kernels)
                row = {"layer": layer, "granularity": granularity, "block_size": size, "density": density}
                row |= {"ms": timings(ways, args.rounds, device), "peak_mib": peaks(ways, device)}
                if kernels:
                    row["error"] = kernel_error(ways["triton"](), dy, x, units, size)
                results.append(row)
                show(row)
    verdict(results, kernels)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, "tokens": args.tokens, "results": results}, indent=1) + "\n"
        )


def draw_units(rows: int, cols: int, density: float, size: int, generator: torch.Generator) -> torch.Tensor:
    """Sorted, distinct units at random, int32."""
    total = rows * cols // (size * size or 1)
    count = max(1, round(density * total))
    return torch.randperm(total, generator=generator, device=generator.device)[:count].sort().values.int()


def ways_to(dy, x, units, granularity: str, size: int, kernels: bool) -> Ways:
    """The dense gradient, torch's path to the support, and the kernel."""

    def without_triton() -> torch.Tensor:
        with mock.patch.dict(os.environ, HF_SPARSE_PEFT_TRITON="0"):
            return unit_gradient(dy, x, units, granularity, size)

    ways: Ways = {"dense": lambda: dy.t() @ x, "torch": without_triton}
    if kernels and granularity == "entry":
        ways["triton"] = lambda: triton_kernels.entry_gradient(dy, x, units)
    elif kernels:
        ways["triton"] = lambda: triton_kernels.block_gradient(dy, x, units, size)
    return ways


def timings(ways: Ways, rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    flush = torch.empty(1 << 30, dtype=torch.uint8, device=device) if device.type == "cuda" else None
    for number in range(rounds + 1):  # the first round compiles and warms up
        for name, way in ways.items():
            taken = _gpu_ms(way, flush) if flush is not None else _cpu_ms(way)
            if number:
                found[name].append(taken)
    return {name: statistics.median(times) for name, times in found.items()}


def _cpu_ms(way: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    way()
    return (time.perf_counter() - start) * 1e3


def _gpu_ms(way: Callable[[], torch.Tensor], flush: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()  # empties L2, and keeps the GPU busy while the CPU enqueues what is timed
    start.record()
    way()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peaks(ways: Ways, device: torch.device) -> dict[str, float]:
    """MiB that each way allocates at its worst, its result included; empty on CPU."""
    found = {}
    for name, way in ways.items() if device.type == "cuda" else ():
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        way()
        found[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return found


def kernel_error(got: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, units: torch.Tensor, size: int) -> float:
    """Largest error of the first 64 units against float64, over the largest gradient among them."""
    got, units = got[:64].double(), units[:64].long()
    per_row, size = x.shape[1] // (size or 1), size or 1
    inner = torch.arange(size, device=x.device)
    left = dy[:, (units // per_row * size)[:, None] + inner].double()  # [tokens, k, b]
    right = x[:, (units % per_row * size)[:, None] + inner].double()
    expected = torch.einsum("tkb,tkc->kbc", left, right)
    return ((got.view_as(expected) - expected).abs().max() / expected.abs().max()).item()


def show(row: dict) -> None:
    """One table line a way."""
    support = f"{row['granularity']} {row['block_size'] or ''}".strip() + f" {row['density']:.1%}"
    for name, ms in row["ms"].items():
        peak = f"{row['peak_mib'][name]:10.1f}" if name in row["peak_mib"] else f"{'-':>10}"
        print(f"{support:<18}{name:<10}{ms:9.3f}{ms / row['ms']['dense']:10.2f}{peak}", flush=True)


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


def verdict(results: list[dict], kernels: bool) -> None:
    """The crossovers, and the errors."""
    print()
    if not kernels:
        print("Crossover of the Triton kernels: not measured, there is no GPU. SAMPLED_DENSITY stays what it is.")
        return
    for granularity, size in dict.fromkeys((row["granularity"], row["block_size"]) for row in results):
        for layer in SHAPES:
            rows = [r for r in results if (r["layer"], r["granularity"], r["block_size"]) == (layer, granularity, size)]
            found = crossover([(r["density"], r["ms"]["triton"] / r["ms"]["torch"]) for r in rows])
            print(f"{granularity} {size or '':<3} {layer:<9} Triton is faster than torch up to density: {found}")
    print(f"largest error of a kernel against float64, relative: {max(row['error'] for row in results):.1e}")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tokens", type=int, default=4 * 768)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--blocks", type=int, nargs="*", default=sorted(triton_kernels.BLOCK_WARPS))
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
