"""The GaLore family on whole weights: bytes of optimizer state by count, and losses against reference implementations.

    python recipes/benchmarks/galore.py                                      # bytes, and 200 steps on the demo base
    python recipes/benchmarks/galore.py --preset llama-3b --steps 0          # bytes alone, without weights
    PYTHONPATH=FOLDER python recipes/benchmarks/galore.py                    # with galore-torch installed in FOLDER

`bytes`: the model is built on the meta device and the optimizer takes a step there; nothing is computed. `loss`: the
demo base, fp32, all weights, the same batches; `ours` is the package, `reference` is written here from the papers'
equations and shares no code with it, `galore-torch` is the authors' class where it can be imported, compared with our
`released=True`. They share a sign convention of singular vectors (GaLore's moments outlive a basis), which the authors'
class gets by a wrapper around its SVD. A table goes to the terminal, `galore.json` to `--output`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars as disable_datasets_bars
from harness import Column, Rows, option, parse, print_table
from llama import LlamaOptions
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed
from transformers.utils.logging import disable_progress_bar

from hf_sparse_peft import make_optimizer, methods
from hf_sparse_peft.preflight.optimizer_state import optimizer_of

# isort: split
import demo_data  # found by harness

DEMO_BASE = Path(__file__).resolve().parents[1] / "demo_base"
FAMILY = {
    "galore": ("galore", True, {}),
    "galore 8-bit": ("galore", True, {"bits": 8}),
    "fira": ("fira", True, {}),
    "frugal": ("frugal", False, {}),
    "frugal columns": ("frugal", False, {"projection": "columns"}),
    "gradnormlorp": ("gradnormlorp", True, {}),
    "muon": ("muon", False, {}),
}
"""Rows: a method of `methods.whole`, whether it has a rank, options."""
EVERY, RATE, BETAS, EPS = 50, 1e-3, (0.9, 0.999), 1e-6


@dataclass
class GaloreOptions(LlamaOptions):
    """Options of this benchmark."""

    rank: int = option(0, "rank of the projections; by default a quarter of the hidden size, at most 1024")
    steps: int = option(200, "steps whose losses are compared; 0: bytes alone")
    batch_size: int = option(8, "sequences of 64 tokens of a step")


# Bytes


def on_meta(options: GaloreOptions, dtype: torch.dtype) -> LlamaForCausalLM:
    """The preset's model without weights, all of it trained."""
    sizes = options.sizes()
    config = LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, vocab_size=sizes.vocab,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(dtype)


def state_bytes(name: str, rank: int, options: GaloreOptions) -> dict[str, Any]:
    """Bytes of the state after a step, of all weights and of the matrices in the layers alone, bf16 weights."""
    model = on_meta(options, torch.bfloat16)
    found = {}
    for what, part in (("all weights", model), ("layers", model.model.layers)):
        size = sum(p.numel() for p in part.parameters())
        bytes_ = 8 * size  # AdamW with fp32 moments
        if name in FAMILY:
            method, ranked, more = FAMILY[name]
            spec = methods.whole(method, **more, **({"rank": rank} if ranked else {})).optimizer
            _, bytes_ = optimizer_of(part, spec)
        found |= {what: bytes_, f"{what}, a weight": bytes_ / size}
    return found | {"numbers": sum(p.numel() for p in model.parameters())}


# Losses


class Reference:
    """GaLore (Zhao et al., 2024, algorithm 2) or Fira (Chen et al., 2024) on matrices, Adam on all else."""

    def __init__(self, model: nn.Module, rank: int, scale: float, fira: bool):
        self.named, self.rank, self.scale, self.fira = dict(model.named_parameters()), rank, scale, fira
        self.state: dict[str, dict[str, Any]] = {name: {"t": 0} for name in self.named}

    @torch.no_grad()
    def step(self) -> None:
        for name, p in self.named.items():
            self._step(self.state[name], p, p.grad, matrix=p.dim() == 2 and "embed" not in name)
            p.grad = None

    def _step(self, s: dict[str, Any], p: Tensor, g: Tensor, matrix: bool) -> None:
        tall = p.dim() == 2 and p.shape[0] >= p.shape[1]
        if matrix and s["t"] % EVERY == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            s["P"] = oriented(vh[: self.rank].T if tall else u[:, : self.rank])
        low = g if not matrix else g @ s["P"] if tall else s["P"].T @ g
        s["t"] += 1
        s["m"] = BETAS[0] * s.get("m", 0) + (1 - BETAS[0]) * low
        s["v"] = BETAS[1] * s.get("v", 0) + (1 - BETAS[1]) * low**2
        n = s["m"] / (1 - BETAS[0] ** s["t"]) / ((s["v"] / (1 - BETAS[1] ** s["t"])).sqrt() + EPS)
        if not matrix:
            p -= RATE * n
            return
        back = (lambda x: x @ s["P"].T) if tall else (lambda x: s["P"] @ x)
        update = back(n)
        if self.fira:
            axis = 1 if tall else 0
            rest = (g - back(low)) * n.norm(dim=axis, keepdim=True) / (low.norm(dim=axis, keepdim=True) + 1e-8)
            if "norm" in s:
                rest = rest / (torch.clamp(rest.norm() / (s["norm"] + 1e-8), min=1.01) / 1.01)
            s["norm"] = rest.norm()
            update = update + rest
        p -= RATE * self.scale * update


def oriented(basis: Tensor) -> Tensor:
    """The largest entry of each column positive."""
    places = basis.abs().max(dim=0).indices
    return basis * basis[places, torch.arange(basis.shape[1])].sign()


def authors(model: nn.Module, rank: int, scale: float) -> Any:
    """galore-torch's AdamW; None where it is not installed."""
    try:
        from galore_torch import GaLoreAdamW
        from galore_torch.galore_projector import GaLoreProjector
    except ImportError:
        return None
    given = GaLoreProjector.get_orthogonal_matrix

    def signed(self: Any, weights: Tensor, rank: int, type: str) -> Tensor:
        found = given(self, weights, rank, type)
        return oriented(found.T).T.contiguous() if type == "right" else oriented(found).contiguous()

    GaLoreProjector.get_orthogonal_matrix = signed
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    group = {"params": matrices, "rank": rank, "update_proj_gap": EVERY, "scale": scale, "proj_type": "std"}
    return GaLoreAdamW([{"params": others}, group], lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0)


def batches(options: GaloreOptions) -> Iterator[Tensor]:
    """The same sequences for every run."""
    problems = demo_data.word_problems(2000, seed=0, split="train")
    text = problems.map(lambda row: {"text": row["prompt"] + row["answer"]})
    rows = demo_data.chunk_text(text, AutoTokenizer.from_pretrained(DEMO_BASE), 64)
    ids = torch.tensor(rows["input_ids"])
    for step in range(options.steps):
        places = torch.arange(step * options.batch_size, (step + 1) * options.batch_size) % len(ids)
        yield ids[places]


def losses(make: Callable[[nn.Module], Any], options: GaloreOptions) -> list[float] | None:
    """The loss of each step of a run; None where there is no such optimizer."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)
    optimizer, found = make(model), []
    if optimizer is None:
        return None
    for ids in batches(options):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        model.zero_grad()
        found.append(float(loss.detach()))
    return found


def compare(name: str, options: GaloreOptions) -> dict[str, Any]:
    """Ours against a reference, or the authors' class against ours in its arithmetic."""
    rank, scale = 48, 0.25
    method = "fira" if name == "fira" else "galore"
    released = name == "galore-torch"
    more = {"rank": rank, "every": EVERY, "scale": scale, "eps": EPS, "released": released}
    spec = methods.whole(method, **more).optimizer
    ours = losses(lambda model: make_optimizer(model, lr=RATE, spec=spec), options)
    if released:
        theirs = losses(lambda model: authors(model, rank, scale), options)
        if theirs is None:
            return {"error": "galore-torch is not installed"}
    else:
        theirs = losses(lambda model: Reference(model, rank, scale, method == "fira"), options)
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    tenth = max(1, len(ours) // 10)
    return {
        "first": ours[0],
        "ours": sum(ours[-tenth:]) / tenth,
        "other": sum(theirs[-tenth:]) / tenth,
        "largest difference": max(apart),
        "first 50": max(apart[:50]),
    }


BYTES = (
    Column("optimizer", "optimizer"),
    Column("state, MiB", lambda row: row["all weights"] / 2**20, "{:,.1f}"),
    Column("bytes a weight", "all weights, a weight", "{:.2f}"),
    Column("in the layers, MiB", lambda row: row["layers"] / 2**20, "{:,.1f}"),
    Column("bytes a weight there", "layers, a weight", "{:.2f}"),
)
LOSSES = (
    Column("against", "against"),
    Column("first loss", "first", "{:.4f}"),
    Column("ours, last tenth", "ours", "{:.4f}"),
    Column("other", "other", "{:.4f}"),
    Column("largest difference of a step", "largest difference", "{:.1e}"),
    Column("of the first 50", "first 50", "{:.1e}"),
)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Count, compare and report; returns the rows."""
    options = parse(GaloreOptions, __doc__, argv)
    disable_progress_bar()
    disable_datasets_bars()
    sizes = options.sizes()
    rank = options.rank or min(1024, sizes.hidden // 4)
    rows = Rows(options, "galore", {"model": asdict(sizes), "rank": rank, "steps": options.steps})
    counted = [
        rows.measure(partial(state_bytes, name, rank, options), part="bytes", optimizer=name)
        for name in ("adamw fp32", *FAMILY)
    ]
    print_table(f"optimizer state, {counted[0]['numbers']:,} weights, rank {rank}", BYTES, counted)
    if options.steps:
        names = ("galore", "fira", "galore-torch")
        compared = [rows.measure(partial(compare, name, options), part="loss", against=name) for name in names]
        compared = [row for row in compared if "error" not in row]
        print_table(f"losses over {options.steps} steps on the demo base", LOSSES, compared)
        counted += compared
    return counted


if __name__ == "__main__":
    main()
