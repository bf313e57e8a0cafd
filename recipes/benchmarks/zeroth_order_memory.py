"""Peak memory of an evaluation, of a MeZO step and of an AdamW step, side by side in one process.

    python recipes/benchmarks/zeroth_order_memory.py                                # CPU, bf16 and NF4 bases
    python recipes/benchmarks/zeroth_order_memory.py --device cuda --preset llama-3b

MeZO's claim is "the memory of inference" (Malladi et al., 2023). Every row trains the same numbers on the same batch:
`inference` is a forward with labels and without gradients, so its peak is the floor; MeZO may add one chunk of a
direction (`chunk`), Sparse MeZO on whole weights also one bit a weight, AdamW adds activations, gradients and two
moments. On a CPU bytes are counted from the allocator's events (torch.profiler), on a GPU by `max_memory_allocated`;
both repeat exactly. Nothing here is timed. A table goes to the terminal, `zeroth_order_memory.json` to `--output`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from harness import Column, Rows, build_method, option, parse, print_table
from llama import LlamaOptions, build_base
from peft import get_peft_model
from torch import nn
from trial import peak_bytes

from hf_sparse_peft.optim import ZerothOrderSGD, zeroth_order_groups

TRAINED = {"lora": "lora:r=8", "support": "sparse-mezo", "full": None}
"""What is trained: candidates, and the base's own tensors."""
STEPS = ("inference", "mezo", "mezo-layerwise", "sparse-mezo", "adamw")
LARGEST_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass
class MemoryOptions(LlamaOptions):
    """Options of this benchmark."""

    bases: list[str] = option(["bf16", "nf4"], "of bf16, fp32 and nf4")


def step(model: nn.Module, input_ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """One step with everything that belongs to it: an evaluation, MeZO's or AdamW's."""

    def loss() -> torch.Tensor:
        return model(input_ids=input_ids, labels=input_ids).loss

    if isinstance(optimizer, torch.optim.AdamW):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return
    with torch.no_grad():
        if optimizer is None:
            loss()
            return
        losses = []
        for sign in (1, -1):
            with optimizer.shifted(sign, model):
                losses.append(float(loss()))
        optimizer.add_difference(losses[0] - losses[1])
        optimizer.step()


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer | None:
    """What makes a step of this kind, at learning rate 0 so that every kind sees the same weights."""
    if kind == "inference":
        return None
    if kind == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    options = {"perturbation": "layerwise"} if kind == "mezo-layerwise" else {}
    sparsity = 0.75 if kind == "sparse-mezo" else 0.0
    return ZerothOrderSGD(zeroth_order_groups(model), lr=0.0, sparsity=sparsity, **options)


def measure(trained: str, base: str, options: MemoryOptions) -> dict[str, Any]:
    """Peak bytes of every kind of step of one model; each is taken at its second step, when its state exists."""
    preset = options.sizes()
    model = build_base(preset, base, options.device)
    if TRAINED[trained]:
        model = get_peft_model(model, build_method(TRAINED[trained], target_modules="all-linear").config)
    else:
        model.requires_grad_(True)
    torch.manual_seed(1)
    input_ids = torch.randint(preset.vocab, (preset.batch, preset.tokens), device=options.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    peaks = {}
    for kind in STEPS:
        if kind == "sparse-mezo" and trained != "full":
            continue  # adapters: the support is the mask, and the step is MeZO's
        model.train(kind == "adamw")
        optimizer = optimizer_of(kind, model)
        work = partial(step, model, input_ids, optimizer)
        work()
        peaks[kind] = peak_bytes(model, optimizer, work, options.device)
        del work, optimizer
    chunk = min(max(p.numel() for p in parameters), LARGEST_CHUNK[options.device])
    wide = 4 * chunk if any(p.dtype != torch.float32 for p in parameters) else 0  # sums of 16-bit weights, in fp32
    return {
        "trained_numbers": sum(p.numel() for p in parameters),
        "chunk_bytes": 4 * chunk + wide,
        "largest_module_bytes": _largest_module(model),
        "peak_bytes": peaks,
        "over_inference": {kind: peak / peaks["inference"] for kind, peak in peaks.items()},
    }


def _largest_module(model: nn.Module) -> int:
    return max(sum(p.nbytes for p in module.parameters(recurse=False) if p.requires_grad) for module in model.modules())


def _peak(kind: str) -> Column:
    def cell(row: dict[str, Any]) -> str | None:
        found = row["peak_bytes"].get(kind)
        return None if found is None else f"{found / 2**20:.1f} ({row['over_inference'][kind]:.3f})"

    return Column(kind, cell)


COLUMNS = (
    Column("trained, base", lambda row: f"{row['trained']}, {row['base']}"),
    Column("numbers", "trained_numbers", "{:,}"),
    *(_peak(kind) for kind in STEPS),
    Column("chunk", lambda row: row["chunk_bytes"] / 2**20, "{:.1f}"),
)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure and report; returns the rows."""
    options = parse(MemoryOptions, __doc__, argv)
    rows = Rows(options, "zeroth_order_memory", {"model": asdict(options.sizes())}, timed=True)
    found = [
        rows.measure(partial(measure, trained, base, options), trained=trained, base=base)
        for base in options.bases
        for trained in TRAINED
        if (trained, base) != ("full", "nf4")  # 4-bit weights cannot move
    ]
    print_table("peak memory of a step, MiB (times that of inference)", COLUMNS, found)
    return found


if __name__ == "__main__":
    main()
