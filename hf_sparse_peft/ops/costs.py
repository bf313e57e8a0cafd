r"""What the ways to one result cost, and which is the cheapest: for gradients at entries, for products with supports.

Costs are picoseconds, by device and dtype, from `costs.json` beside this file. Only their ratios matter, so one table
serves machines of a kind. A row says how it was found: a measurement names machine and threads; an estimate says so.

    name               of what                                                                            a token
    dense_number       a number of a product's matrix, times its tokens                                    yes
    sampled_entry      an entry of a sampled gradient (one dot product over the tokens)                    yes
    transposed_line    a row of dY or column of X that a sampled gradient transposes first                 yes
    moved_line         a column of activations that is gathered, or added to                               yes
    sparse_entry       an entry of a product with a sparse matrix; absent where there is none              yes
    small_number       a number of rows, columns and blocks in products of their own                       yes
    copied_number      a number of a weight that is copied                                                 no
    copied_entry       an entry that is added to that copy                                                 no

`recipes/benchmarks/engine_costs.py` measures CPUs. To replace the row of another device: `write_costs`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

PATH = Path(__file__).with_name("costs.json")


@dataclass(frozen=True)
class Costs:
    """One row of the table, in picoseconds (see the module)."""

    dense_number: float
    sampled_entry: float
    transposed_line: float
    moved_line: float
    small_number: float
    copied_number: float
    copied_entry: float
    sparse_entry: float | None = None


def load_costs(path: Path = PATH) -> list[dict]:
    """The rows of the table: `device` ("cpu", "cuda"), `dtype` ("bfloat16"), `how`, and the `costs`."""
    return json.loads(path.read_text())


def write_costs(device: str, dtype: torch.dtype, costs: Costs, how: str, path: Path = PATH) -> None:
    """Put a row into the table in place of the one of this device and dtype, for this process too.

    Args:
        device: a device's type, as `tensor.device.type` says it.
        how: where and how it was measured: accelerator or processor, threads, versions.

    Raises:
        ValueError: a cost is not a positive, finite number.
    """
    for name, value in asdict(costs).items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}={value} must be a positive number of picoseconds.")
    rows = load_costs(path) if path.exists() else []
    name = str(dtype).removeprefix("torch.")
    rows = [row for row in rows if (row["device"], row["dtype"]) != (device, name)]
    figures = {key: float(f"{value:.3g}") for key, value in asdict(costs).items() if value is not None}
    rows.append({"device": device, "dtype": name, "how": how, "costs": figures})
    rows.sort(key=lambda row: (row["device"], row["dtype"]))
    path.write_text(json.dumps(rows, indent=2) + "\n")
    _table.cache_clear()


def costs_of(device: str, dtype: torch.dtype) -> Costs:
    """The row of a device's type and a dtype; devices and dtypes without one take those of "cuda" and float32."""
    table, name = _table(), str(dtype).removeprefix("torch.")
    device = device if (device, "float32") in table else "cuda"
    return table.get((device, name)) or table[device, "float32"]


@functools.cache
def _table() -> dict[tuple[str, str], Costs]:
    names = {field.name for field in fields(Costs)}
    return {
        (row["device"], row["dtype"]): Costs(**{k: v for k, v in row["costs"].items() if k in names})
        for row in load_costs()
    }


def entry_gradient_way(
    costs: Costs, rows: int, cols: int, entries: int, subgrid: tuple[int, int] | None, may_sample: bool = True
) -> Literal["dense", "sampled", "compacted"]:
    """The cheapest way to the gradient at `entries` of a `[rows, cols]` weight: the dense gradient, tile by tile, and a
    gather; a dot product for each; the dense gradient of a sub-grid of `(R, C)` lines, and a gather. All grow with the
    tokens alike, so their number does not matter."""
    ways = {"dense": rows * cols * costs.dense_number}
    if may_sample and entries:
        ways["sampled"] = entries * costs.sampled_entry + (rows + cols) * costs.transposed_line
    if subgrid is not None:
        ways["compacted"] = subgrid[0] * subgrid[1] * costs.dense_number + sum(subgrid) * costs.moved_line
    return min(ways, key=ways.get)


def entry_product_way(
    costs: Costs,
    tokens: int,
    rows: int,
    cols: int,
    entries: int,
    subgrid: tuple[int, int] | None,
    *,
    gradient: bool = False,
    copied: bool = True,
    may_copy: bool = True,
) -> Literal["copy", "sparse", "compacted"]:
    r"""The cheapest way to a product with `entries`, forward or (`gradient`) the input's: a copy of the weight, with
    them added; a sparse product beside the base's; a dense product of a sub-grid's `(R, C)` lines beside it.

    `copied` says whether the weight has to be copied first: what was just dequantised need not. Without `may_copy` the
    other two are asked for.
    """
    ways = {}
    if may_copy:
        ways["copy"] = entries * costs.copied_entry + (rows * cols * costs.copied_number if copied else 0.0)
    if costs.sparse_entry is not None or (subgrid is None and not may_copy):
        ways["sparse"] = tokens * entries * (costs.sparse_entry or 0.0)
    if subgrid is not None:
        # What is added to is read and written; what is multiplied is read, or was already.
        moved = 2 * subgrid[1 if gradient else 0] + subgrid[0 if gradient else 1]
        dense = subgrid[0] * subgrid[1] * costs.dense_number
        ways["compacted"] = tokens * (dense + moved * costs.moved_line) + entries * costs.copied_entry
    return min(ways, key=ways.get)


def product_pays(costs: Costs, tokens: int, rows: int, cols: int, numbers: int) -> bool:
    """Whether rows, columns or blocks of `numbers` in all are cheaper in a product of their own than in a copy."""
    return tokens * numbers * costs.small_number <= rows * cols * costs.copied_number
