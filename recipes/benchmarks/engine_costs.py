"""Measures what the engine chooses its ways by, and writes the rows of `hf_sparse_peft/ops/costs.json`.

    OMP_NUM_THREADS=1 python recipes/benchmarks/engine_costs.py                 # print what this CPU takes
    OMP_NUM_THREADS=1 python recipes/benchmarks/engine_costs.py --write         # and put it into the package's table

Each cost is the slope between two sizes of one thing, at the shapes of a 1024-wide layer and 1024 tokens, medians of
CPU time over rounds; on a GPU (`gpu.py`) at 4096 of both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from harness import Column, Options, machine, option, parse, print_table
from kernel_cost import Unit, kernels_run, timer_of

from hf_sparse_peft.ops import DenseSource, EntryIndex, Support, put_columns_, take_columns, triton_kernels
from hf_sparse_peft.ops.costs import Costs, write_costs
from hf_sparse_peft.ops.support_product import add_support_product_
from hf_sparse_peft.ops.units import sampled_gradient, transposed_pieces

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class CostOptions(Options):
    """Options of this benchmark."""

    rounds: int = option(9, "timings of each thing")
    write: bool = option(False, "put the rows into the package's table")


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(CostOptions, __doc__, argv)
    found = {dtype: measure(dtype, options.rounds, torch.device(options.device)) for dtype in DTYPES}
    print_costs(found)
    if options.write:
        write(found, options.device)


def print_costs(found: dict[torch.dtype, Costs]) -> None:
    """A line a row of the table."""
    columns = [Column("dtype", "dtype"), *(Column(field.name, field.name, "{:.3g}") for field in fields(Costs))]
    print_table("picoseconds", columns, [{"dtype": str(dtype)} | asdict(costs) for dtype, costs in found.items()])


def write(found: dict[torch.dtype, Costs], device: str) -> None:
    """Put rows into the package's table."""
    threads = f"{torch.get_num_threads()} threads, " if device == "cpu" else ""
    how = f"measured: {machine(device)['device']}, {threads}torch {torch.__version__}"
    for dtype, costs in found.items():
        write_costs(device, dtype, costs, how)


def measure(dtype: torch.dtype, rounds: int, device: torch.device, side: int | None = None) -> Costs:
    """One row, at a layer of `side` x `side` and as many tokens."""
    on_cpu, kernels = device.type == "cpu", kernels_run(device)
    tokens = side = side or (1024 if on_cpu else 4096)
    generator, timer = torch.Generator(device).manual_seed(0), timer_of(device)
    x, dy, weight = (torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(3))
    few, many = (Unit("entry").draw(side, side, side * each, generator) for each in (8, 32))

    def picoseconds(work: Callable[[], Any]) -> float:
        return statistics.median([timer(work) for _ in range(rounds + 1)][1:]) * 1e9

    def slope(work: Callable[[EntryIndex], Any]) -> float:
        # Fresh forms each time, as in a step.
        times = [picoseconds(lambda units=units: work(EntryIndex(units, None, side, side))) for units in (few, many)]
        return (times[1] - times[0]) / (many.numel() - few.numel())  # the table takes none that noise made negative

    def sampled(index: EntryIndex) -> torch.Tensor:
        return triton_kernels.entry_gradient(dy, x, index.flat) if kernels else sampled_gradient(dy, x, index)

    def transposed() -> Any:
        return triton_kernels.token_contiguous(x) if kernels else [p.float() for p in transposed_pieces(x)]

    def ones(index: EntryIndex) -> Support:
        return Support(index, torch.ones(index.numel(), device=device), "entry")

    lines = torch.arange(0, side, 4, dtype=torch.int32, device=device)
    moved = picoseconds(lambda: put_columns_(dy, lines, take_columns(x, lines)))
    block = torch.randn(side // 32, 32, 32, generator=generator, device=device).to(dtype)
    blocks = Support(torch.arange(side // 32, dtype=torch.int32, device=device) * (side // 32 + 1), block, "block", 32)
    source = DenseSource(weight)
    some = slice(min(64, tokens))
    return Costs(
        dense_number=picoseconds(lambda: x @ weight.t()) / (side * side * tokens),
        sampled_entry=slope(sampled) / tokens,
        transposed_line=picoseconds(transposed) / (side * tokens),
        moved_line=moved / (2 * lines.numel() * tokens),
        small_number=picoseconds(lambda: add_support_product_(dy, x, blocks)) / (block.numel() * tokens),
        copied_number=picoseconds(lambda: source.read(dtype).clone()) / (side * side),
        copied_entry=slope(lambda index: source.with_support(ones(index), dtype)),
        # Sparse products are asked for on CPUs alone.
        sparse_entry=slope(lambda i: add_support_product_(dy[some].clone(), x[some], ones(i))) / 64 if on_cpu else None,
    )


if __name__ == "__main__":
    main()
