"""Weight patches: what making, applying, swapping and reverting one costs beside loading the model, and their bytes.

    python recipes/benchmarks/patches.py                   # 180 M random bf16 weights, a minute on one CPU core
    python recipes/benchmarks/patches.py --preset llama-8b --payload_only

Times are those of one thread's CPU clock, medians of interleaved rounds, as shares of loading the same model from files
in the page cache: `from_pretrained`, which maps them, and one copy into memory of the model's own, as to a device. Two
adapters of `--density` of every linear weight take turns. Payloads are counted for every matrix of Llama-3.1-8B at
`--payload_density`, on shapes alone: int32 indices and bf16 values, as engines hold them, the file of `export_patch`,
and the least that any file of free entries can have, log2(e / density) bits an index.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import Column, Rows, option, parse, print_table
from llama import PRESETS, LlamaOptions, build_base

# isort: split
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from hf_sparse_peft import SparseLoraConfig, hub
from hf_sparse_peft.hub.patches.patch_files import coded_bytes
from hf_sparse_peft.hub.patches.weight_patch import weight_patch
from hf_sparse_peft.sparsity import UnitGrid
from hf_sparse_peft.tuners import adapter_layers

GRANULARITIES = ("entry", "block", "row", "column")
STEPS = ("make", "apply", "swap", "revert")


@dataclass
class PatchOptions(LlamaOptions):
    """Options of this benchmark."""

    layers: int | None = option(16, "instead of the preset's")
    density: float = option(0.01, "share of every linear weight that a patch changes")
    rounds: int = option(5, "interleaved rounds")
    granularities: list[str] = option(list(GRANULARITIES), f"of {', '.join(GRANULARITIES)}")
    payload_density: float = option(0.001, "share of every matrix, in the table of bytes")
    payload_only: bool = option(False, "leave the times out")


def adapter(base: torch.nn.Module, granularity: str, density: float, seed: int) -> torch.nn.Module:
    """`base` with a support of random units and values that change every entry of it."""
    config = SparseLoraConfig(
        r=0, density=density, granularity=granularity, block_size=32, criterion="random", seed=seed,
        target_modules="all-linear",
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model):
            for parameter in layer.trained_parameters("default"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def load(folder: str) -> torch.nn.Module:
    """The model in memory of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what the work returned."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def measure(granularity: str, options: PatchOptions) -> dict[str, Any]:
    """Times of one granularity."""
    base = build_base(options.sizes(), "bf16", options.device)
    parameters = sum(p.numel() for p in base.parameters())
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        transformers.utils.logging.disable_progress_bar()
        # Exact restore is checked below against these.
        pristine = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        models = [adapter(base, granularity, options.density, seed) for seed in (1, 2)]
        del base
        found: dict[str, list[float]] = {"load": [], **{step: [] for step in STEPS}}
        for _ in range(options.rounds):
            spent, server = seconds(partial(load, folder))
            found["load"].append(spent)
            spent, first = seconds(partial(hub.make_patch, models[0]))
            found["make"].append(spent)
            second = hub.make_patch(models[1])
            found["apply"].append(seconds(partial(hub.apply_patch, server, first))[0])
            found["swap"].append(seconds(partial(hub.swap_patch, server, second))[0])
            found["revert"].append(seconds(partial(hub.revert_patch, server))[0])
        size = hub.write_patch(first, Path(folder) / "patch.safetensors")
    medians = {step: statistics.median(values) for step, values in found.items()}
    return {
        "parameters": parameters,
        "entries": first.entries,
        "unchanged": first.unchanged,
        "seconds": medians,
        "of_loading": {step: medians[step] / medians["load"] for step in STEPS},
        "payload_bytes": first.payload_bytes,
        "file_bytes": size,
        "exact": all(torch.equal(pristine[name], tensor) for name, tensor in server.state_dict().items()),
    }


def payload(granularity: str, options: PatchOptions) -> dict[str, Any]:
    """Bytes of a patch of every matrix of Llama-3.1-8B, one matrix of each shape being coded."""
    preset = PRESETS["llama-8b"]
    shapes: Counter[tuple[int, int]] = Counter()
    with torch.device("meta"):
        for _, parameter in build_base(preset, "bf16", "meta").named_parameters():
            if parameter.ndim == 2:
                shapes[tuple(parameter.shape)] += 1
    shapes[(preset.vocab, preset.hidden)] += 1  # the 8B's head is a matrix of its own
    generator = torch.Generator().manual_seed(0)
    entries = held = stored = 0
    for (rows, cols), count in shapes.items():
        grid = UnitGrid(rows, cols, granularity, 32)
        units = round(options.payload_density * grid.num_units)
        chosen = torch.randint(grid.num_units, (2 * units + 8,), generator=generator).unique()
        chosen = chosen[torch.randperm(chosen.numel(), generator=generator)[:units]].sort().values
        positions = grid.entry_positions(chosen).reshape(-1).sort().values
        item = weight_patch("w", (rows, cols), torch.zeros(positions.numel(), dtype=torch.bfloat16), positions)
        entries += count * positions.numel()
        held += count * 6 * positions.numel()
        stored += count * coded_bytes(item)
    free = granularity == "entry"
    floor = entries * (2 + math.log2(math.e / options.payload_density) / 8) if free else 2 * entries
    matrices = sum(rows * cols * count for (rows, cols), count in shapes.items())
    return {"matrices": matrices, "entries": entries, "held_bytes": held, "file_bytes": stored, "floor_bytes": floor}


TIMES = (
    Column("granularity", "granularity"),
    Column("entries", "entries", "{:,}"),
    Column("loading, CPU s", lambda row: row["seconds"]["load"], "{:.3f}"),
    *(Column(step, lambda row, step=step: row["of_loading"][step], "{:.3f}") for step in STEPS),
    Column("MB", lambda row: row["payload_bytes"] / 1e6, "{:.2f}"),
    Column("file, MB", lambda row: row["file_bytes"] / 1e6, "{:.2f}"),
    Column("exact", lambda row: "yes" if row["exact"] else "NO"),
)
BYTES = (
    Column("granularity", "granularity"),
    Column("values", "entries", "{:,}"),
    Column("int32 + bf16, MB", lambda row: row["held_bytes"] / 1e6, "{:.1f}"),
    Column("file, MB", lambda row: row["file_bytes"] / 1e6, "{:.1f}"),
    Column("least, MB", lambda row: row["floor_bytes"] / 1e6, "{:.1f}"),
)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; returns the rows."""
    options = parse(PatchOptions, __doc__, argv)
    setting = {"model": asdict(options.sizes()), "density": options.density, "rounds": options.rounds}
    found = []
    if not options.payload_only:
        rows = Rows(options, "patches", setting, timed=True)
        found = [rows.measure(partial(measure, g, options), granularity=g) for g in options.granularities]
        print_table(f"{options.density:.1%} of {found[0]['parameters']:,} weights: time / loading", TIMES, found)
    rows = Rows(options, "patch_payload", {"density": options.payload_density})
    sizes = [rows.measure(partial(payload, g, options), granularity=g) for g in options.granularities]
    print_table(f"{options.payload_density:.2%} of {sizes[0]['matrices']:,} weights (Llama-3.1-8B)", BYTES, sizes)
    return found + sizes


if __name__ == "__main__":
    main()
