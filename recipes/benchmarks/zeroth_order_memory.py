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

import argparse
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start on stderr otherwise

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from step_cost_measure import peak_bytes
from step_cost_methods import PRESETS, build_base, sized
from torch import nn

from hf_sparse_peft import methods
from hf_sparse_peft.optim import ZerothOrderSGD, zeroth_order_groups
from hf_sparse_peft.tuners.shared.base_weight import keep_4bit_weight_stable

TRAINED = ("lora", "support", "full")
STEPS = ("inference", "mezo", "mezo-layerwise", "sparse-mezo", "adamw")
LARGEST_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 24}


@dataclass
class Work:
    """One kind of step of one model, as `peak_bytes` measures it."""

    kind: str
    model: nn.Module
    input_ids: torch.Tensor
    optimizer: torch.optim.Optimizer | None = None

    @property
    def device(self) -> str:
        """Device type."""
        return self.input_ids.device.type

    def loss(self) -> torch.Tensor:
        """The model's loss on the batch."""
        return self.model(input_ids=self.input_ids, labels=self.input_ids).loss

    def step(self) -> None:
        """One step, with everything that belongs to it."""
        if self.optimizer is None:
            with torch.no_grad():
                self.loss()
        elif isinstance(self.optimizer, ZerothOrderSGD):
            self._zeroth_order_step()
        else:
            self.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _zeroth_order_step(self) -> None:
        losses = []
        for sign in (1, -1):
            with self.optimizer.shifted(sign, self.model):
                losses.append(float(self.loss()))
        self.optimizer.add_difference(losses[0] - losses[1])
        self.optimizer.step()


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer | None:
    """What makes a step of this kind, at learning rate 0 so that every kind sees the same weights."""
    if kind == "inference":
        return None
    if kind == "adamw":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    options = {"perturbation": "layerwise"} if kind == "mezo-layerwise" else {}
    sparsity = 0.75 if kind == "sparse-mezo" else 0.0
    return ZerothOrderSGD(zeroth_order_groups(model), lr=0.0, sparsity=sparsity, **options)


def build(trained: str, base: nn.Module) -> nn.Module:
    """The model with what is trained on it. `full` trains the base's own tensors."""
    if trained == "full":
        return base.requires_grad_(True)
    if trained == "lora":
        return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    return get_peft_model(base, methods.get("sparse-mezo", target_modules="all-linear").config)


def measure(trained: str, base: str, args: argparse.Namespace) -> dict[str, Any]:
    """Peak bytes of every kind of step of one model; each is taken at its second step, when its state exists."""
    preset = sized(PRESETS[args.preset], args.layers, args.hidden, args.tokens)
    frozen = build_base(preset, base, args.device)
    for module in frozen.modules():  # the evaluation comes first, and would repack 4-bit weights for good
        keep_4bit_weight_stable(module)
    model = build(trained, frozen)
    torch.manual_seed(1)
    input_ids = torch.randint(preset.vocab, (preset.batch, preset.tokens), device=args.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    peaks = {}
    for kind in STEPS:
        if kind == "sparse-mezo" and trained != "full":
            continue  # adapters: the support is the mask, and the step is MeZO's
        model.train(kind == "adamw")
        work = Work(kind, model, input_ids, optimizer_of(kind, model))
        work.step()
        peaks[kind] = peak_bytes(work)
        del work
    chunk = min(max(p.numel() for p in parameters), LARGEST_CHUNK[args.device])
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


def print_table(report: dict[str, dict[str, Any]]) -> None:
    """Peaks in MiB, and over inference's."""
    table = Table(title="peak memory of a step, MiB (times that of inference)")
    table.add_column("trained, base")
    table.add_column("numbers", justify="right")
    for kind in STEPS:
        table.add_column(kind, justify="right")
    table.add_column("chunk", justify="right")
    for name, row in report.items():
        cells = [
            f"{row['peak_bytes'][kind] / 2**20:.1f} ({row['over_inference'][kind]:.3f})"
            if kind in row["peak_bytes"]
            else ""
            for kind in STEPS
        ]
        table.add_row(name, f"{row['trained_numbers']:,}", *cells, f"{row['chunk_bytes'] / 2**20:.1f}")
    Console(width=140).print(table)


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--preset", default="cpu", choices=sorted(PRESETS))
    parser.add_argument("--base", dest="bases", nargs="+", default=["bf16", "nf4"], choices=("bf16", "fp32", "nf4"))
    for name in ("layers", "hidden", "tokens"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--output", type=Path, default=Path("runs/zeroth_order_memory"), help="folder of the JSON file")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*`is_gradient_checkpointing` is deprecated")
    report = {
        f"{trained}, {base}": measure(trained, base, args)
        for base in args.bases
        for trained in TRAINED
        if (trained, base) != ("full", "nf4")  # 4-bit weights cannot move
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "zeroth_order_memory.json").write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)
    return report


if __name__ == "__main__":
    main()
