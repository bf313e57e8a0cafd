"""What every rank of `test_ranks.py` runs: `python tests/training/ranks_script.py OUT '["case"]'`.

Writes `OUT/<case>-rank<r>.pt`: what the case returns, or the error's text.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from peft import get_peft_model
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tiny` is: this runs as a script, too
from training_toolbox import TokenData, tiny_llama

from hf_sparse_peft import (
    AccumulatedGradient,
    AgedAdamWSpec,
    ChooseSupport,
    Controller,
    Prune,
    Regrow,
    SparseLoraConfig,
    adapter_parameters,
    make_optimizer,
)
from hf_sparse_peft.rules import Gradient
from hf_sparse_peft.rules.drop import Age, Sensitivity
from hf_sparse_peft.rules.random_growth import Random
from hf_sparse_peft.sparsity import Grid
from hf_sparse_peft.utils.tensors import whole


def rank() -> int:
    return torch.distributed.get_rank()


def world() -> int:
    return torch.distributed.get_world_size()


def adapted(seed: int = 0, density: float = 0.1, **options):
    """A model whose factors and support are drawn from `seed`."""
    config = SparseLoraConfig(
        r=2, density=density, criterion="random", seed=seed, target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM", optimizer=AgedAdamWSpec(), **{"schedule": [Regrow(every=2, grow=Gradient())], **options},
    )  # fmt: skip
    base = tiny_llama()
    torch.manual_seed(seed)  # the draw of factors
    return get_peft_model(base, config)


def shard(model, adapters: bool = False, **options):
    """The base, and `adapters` too if asked for; as it is in one process."""
    if world() == 1:
        return model
    ignored = set() if adapters else adapter_parameters(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, ignored_params=ignored, **options)
    fully_shard(model, ignored_params=ignored, **options)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(isinstance(p.data, DTensor) == adapters for p in trained)
    return model


def state(model) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("module."): one for name, one in model.state_dict().items()}
    return {name: whole(one).detach().clone() for name, one in named.items() if "sparse_lora" in name}


def train(model, steps: int = 7) -> dict[str, torch.Tensor]:
    """A loop of one's own."""
    ids = TokenData(8 * steps).ids.view(steps, world(), -1, 10)
    optimizer = make_optimizer(model, lr=1e-2)
    with Controller(model, optimizer, total_steps=steps) as rules:
        for step in range(steps):
            rules.before_step()
            mine = ids[step, rank()]
            model(input_ids=mine, labels=mine).loss.backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
    assert any(event.get("replaced") or event.get("pruned") for event in rules.events)
    return state(model)


# Cases


def unlike(wrap) -> dict:
    """Ranks that drew factors and supports from other seeds."""
    model = adapted(seed=rank())
    before = state(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        end = train(wrap(model))
    return {"before": before, "end": end, "told": [str(one.message) for one in told if "ranks" in str(one.message)]}


def other_shapes(wrap) -> dict:
    """Ranks whose supports have other sizes."""
    return train(wrap(adapted(density=0.1 if rank() else 0.2)))


class TwoTowers(torch.nn.Module):
    """A trunk that every sample passes through, and towers of the same shape that some do, or pass into idly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.towers = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
        self.trunk = torch.nn.Linear(8, 8)

    def forward(self, samples: list[tuple[torch.Tensor, list[int], list[int]]]) -> torch.Tensor:
        losses = []
        for inputs, towers, idle in samples:
            hidden = self.trunk(inputs).tanh()
            for tower in idle:
                self.towers[tower](hidden)  # it runs, and reaches no loss
            for tower in towers:
                hidden = hidden + self.towers[tower](hidden)
            losses.append(hidden.square().mean())
        return torch.stack(losses).mean()


def towers(rule, accumulation: int = 1, idle: bool = False) -> dict:
    """Each rank's samples reach another tower, one of them none, and one tower is reached by nobody. With `idle` all
    towers run on every rank."""
    rule = rule if isinstance(rule, ChooseSupport) else Regrow(every=3, grow=rule, fraction=0.5)
    config = SparseLoraConfig(
        r=0, density=0.2, criterion="random", target_modules=["trunk", "towers.0", "towers.1", "towers.2"],
        optimizer=AgedAdamWSpec(), schedule=[rule],
    )  # fmt: skip
    model = get_peft_model(TwoTowers(), config)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if world() > 1 else model
    optimizer, generator = make_optimizer(model, lr=1e-1), torch.Generator().manual_seed(5)
    with Controller(wrapped, optimizer, total_steps=9, accumulation=accumulation) as rules:
        for step in range(9):
            rules.before_step()
            for part in range(accumulation):
                samples = [
                    (torch.randn(4, 8, generator=generator), reached, [0, 1, 2] if idle else [])
                    for reached in ([0], [1] if (step + part) % 3 else [])
                ]
                mine = samples if world() == 1 else [samples[rank()]]
                (wrapped(mine) / accumulation).backward()
                if part < accumulation - 1:
                    rules.after_micro_batch()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
    assert any(event.get("replaced") or event.get("chosen") for event in rules.events)
    return {name: one.clone() for name, one in model.state_dict().items() if "sparse_lora" in name}


def joined() -> dict:
    """Ranks with batches of other numbers, under torch's `Join`."""
    model = DistributedDataParallel(adapted())
    with Join([model]):
        return train(model)


SHARDED = {
    "accumulated": {"schedule": [Regrow(every=3, grow=AccumulatedGradient(steps=2))]},
    "rows, by sensitivity": {
        "density": 0.4, "granularity": "row", "schedule": [Regrow(every=2, grow=Gradient(), drop=Sensitivity())],
    },
    "pruned, at random": {"schedule": [Regrow(every=2, grow=Random()), Prune(every=2, start=0.0, end=0.9)]},
    "on a grid": {"pattern": Grid(0.5, 0.5), "schedule": [Regrow(every=2, grow=Gradient(), drop=Age())]},
}  # fmt: skip
"""Configs of adapters whose parameters are sharded, and move."""


def mesh() -> dict:
    """Two replicas of two shards."""
    return {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))} if world() > 1 else {}


def offloaded() -> dict:
    return {"offload_policy": CPUOffloadPolicy(pin_memory=False)}


ALIKE = {
    "towers": lambda: towers(Gradient()),
    "towers, accumulated": lambda: towers(AccumulatedGradient(steps=2)),
    "towers, micro-batches": lambda: towers(Gradient(), accumulation=2),
    "towers, candidates": lambda: towers(Gradient(candidates=2.0), accumulation=2),
    "towers, chosen": lambda: towers(ChooseSupport(warmup=2, reduction="step"), accumulation=2),
    "idle towers": lambda: towers(Gradient(), idle=True),
    "idle towers, accumulated": lambda: towers(AccumulatedGradient(steps=2), idle=True),
    "idle towers, candidates": lambda: towers(Gradient(candidates=2.0), accumulation=2, idle=True),
    **{
        f"adapters, {name}": lambda one=one: train(shard(adapted(**one), adapters=True))
        for name, one in SHARDED.items()
    },
    "offloaded": lambda: train(shard(adapted(), **offloaded())),
}
"""Cases that end in two processes where they end in one."""
FOUR = {
    "adapters, uneven": lambda: train(shard(adapted(**SHARDED["accumulated"]), adapters=True)),  # 102 units over 4
    "hsdp": lambda: train(shard(adapted(), **mesh())),
    "hsdp, adapters": lambda: train(shard(adapted(**SHARDED["accumulated"]), adapters=True, **mesh())),
}
"""The same in four."""
CASES = {
    **ALIKE,
    **FOUR,
    "joined": joined,
    "unlike-ddp": lambda: unlike(DistributedDataParallel),
    "unlike-fsdp2": lambda: unlike(shard),
    "shapes-ddp": lambda: other_shapes(DistributedDataParallel),
    "shapes-fsdp2": lambda: other_shapes(shard),
}


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name in cases:
        try:
            result = CASES[name]()
        except Exception:
            result = traceback.format_exc()
            print(f"{name} on rank {rank()}: {result}", file=sys.stderr)
        torch.save(result, out / f"{name}-rank{rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
