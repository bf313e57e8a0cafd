"""Measures on a CPU what the engine chooses its ways by, and writes the rows of `hf_sparse_peft/ops/costs.json`.

    OMP_NUM_THREADS=1 python recipes/benchmarks/engine_costs.py                 # print what this machine takes
    OMP_NUM_THREADS=1 python recipes/benchmarks/engine_costs.py --write         # and put it into the package's table

Each cost is the slope between two sizes of one thing, at the shapes of a 1024-wide layer and 1024 tokens; medians of
CPU time over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import Column, Options, machine, option, parse, print_table

from hf_sparse_peft.ops import DenseSource, EntryIndex, Support, put_columns_, take_columns
from hf_sparse_peft.ops.costs import Costs, write_costs
from hf_sparse_peft.ops.support_product import add_support_product_
from hf_sparse_peft.ops.units import sampled_gradient, transposed_pieces

SIDE, TOKENS = 1024, 1024
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class CostOptions(Options):
    """Options of this benchmark."""

    rounds: int = option(9, "timings of each thing")
    write: bool = option(False, "put the rows into the package's table")


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(CostOptions, __doc__, argv)
    where = machine("cpu")
    how = f"measured: {where['device']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    found = {dtype: measure(dtype, options.rounds) for dtype in DTYPES}
    columns = [Column("dtype", "dtype"), *(Column(name, name, "{:.3g}") for name in asdict(found[torch.float32]))]
    print_table("picoseconds", columns, [{"dtype": str(dtype)} | asdict(costs) for dtype, costs in found.items()])
    if options.write:
        for dtype, costs in found.items():
            write_costs("cpu", dtype, costs, how)


def measure(dtype: torch.dtype, rounds: int) -> Costs:
    """One row."""
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (torch.randn(SIDE, SIDE, generator=generator).to(dtype) for _ in range(3))
    few, many = (_entries(count, generator) for count in (SIDE * 8, SIDE * 32))

    def picoseconds(work: Callable[[], Any]) -> float:
        taken = []
        for _ in range(rounds + 1):
            start = time.process_time()
            work()
            taken.append(time.process_time() - start)
        return statistics.median(taken[1:]) * 1e12

    def slope(work: Callable[[EntryIndex], Any]) -> float:
        # Fresh forms each time, as in a step.
        times = [picoseconds(lambda units=units: work(EntryIndex(units, None, SIDE, SIDE))) for units in (few, many)]
        return max(1.0, times[1] - times[0]) / (many.numel() - few.numel())

    def sparse_product(index: EntryIndex) -> None:
        support = Support(index, torch.ones(index.numel()), "entry")
        add_support_product_(dy[:64].clone(), x[:64], support)

    lines = torch.arange(0, SIDE, 4, dtype=torch.int32)
    moved = picoseconds(lambda: put_columns_(dy, lines, take_columns(x, lines)))
    block = torch.randn(SIDE // 32, 32, 32, generator=generator).to(dtype)
    blocks = Support(torch.arange(SIDE // 32, dtype=torch.int32) * (SIDE // 32 + 1), block, "block", 32)
    source = DenseSource(weight)
    return Costs(
        dense_number=picoseconds(lambda: x @ weight.t()) / (SIDE * SIDE * TOKENS),
        sampled_entry=slope(lambda index: sampled_gradient(dy, x, index)) / TOKENS,
        transposed_line=picoseconds(lambda: [piece.float() for piece in transposed_pieces(x)]) / (SIDE * TOKENS),
        moved_line=moved / (2 * lines.numel() * TOKENS),
        small_number=picoseconds(lambda: add_support_product_(dy, x, blocks)) / (block.numel() * TOKENS),
        copied_number=picoseconds(lambda: source.read(dtype).clone()) / (SIDE * SIDE),
        copied_entry=slope(lambda i: source.with_support(Support(i, torch.ones(i.numel()), "entry"), dtype)),
        sparse_entry=slope(sparse_product) / 64,
    )


def _entries(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(SIDE * SIDE, generator=generator)[:count].sort().values.int()


if __name__ == "__main__":
    main()
