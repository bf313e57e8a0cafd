"""What each of two ranks runs for `test_several_processes.py`: short runs whose collectives are counted one by one.

    torchrun --nproc_per_node 2 tests/preflight/collectives_script.py OUT

Writes `OUT/rank<r>.json`: of every case in `MOVING` the name and bytes of each collective; of DDP its buckets; of FSDP2
collectives, bytes of the shards, and of what autograd keeps.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from peft import get_peft_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hf_sparse_peft import Controller, KernelLoraConfig, SparseLoraConfig
from hf_sparse_peft.optim import AgedAdamW
from hf_sparse_peft.rules import Allocate, AlternateModules, Regrow
from hf_sparse_peft.rules.growth import AccumulatedGradient, Gradient, LowRankMagnitude
from hf_sparse_peft.rules.random_growth import Random
from hf_sparse_peft.sparsity import Density, Numbers
from hf_sparse_peft.tuners.shared.ranks import adapter_buffers

SEQ, BATCH, STEPS = 16, 2, 5


def regrow(grow, **options):
    """A run of five steps has one move of it."""
    return Regrow(**{"every": 3, "grow": grow, "fraction": 0.5, "replace_all_first": False, **options})


def sparse(*rules, **options):
    fields = {"r": 0, "density": 0.1, "target_modules": ["q_proj", "k_proj", "down_proj"], "schedule": list(rules)}
    return SparseLoraConfig(**{**fields, **options})


MOVING = {
    "accumulated": (sparse(regrow(AccumulatedGradient(steps=2))), "fp32", 1),
    "accumulated-rows-bf16": (sparse(regrow(AccumulatedGradient(steps=2)), granularity="row"), "bf16", 2),
    "gradient": (sparse(regrow(Gradient())), "fp32", 1),
    "gradient-bf16": (sparse(regrow(Gradient())), "bf16", 1),
    "gradient-two-micro-batches": (sparse(regrow(Gradient())), "bf16", 2),
    "gradient-candidates": (sparse(regrow(Gradient(candidates=1.5))), "fp32", 2),
    "gradient-nf4": (sparse(regrow(Gradient()), granularity="column"), "nf4", 1),
    "low-rank": (sparse(regrow(LowRankMagnitude(rank=4), drop=None)), "fp32", 1),
    "random": (sparse(regrow(Random())), "fp32", 1),
    "allocate": (
        sparse(Allocate(("rank", "support"), Numbers(300), every=2, initial_warmup=0.0, final_warmup=0.3), r=4),
        "fp32", 1,
    ),
    "allocate-kernel": (
        KernelLoraConfig(
            r=4, target_modules=["q_proj", "down_proj"],
            schedule=[Allocate(("kernel",), Density(0.7), every=2, initial_warmup=0.0, final_warmup=0.5)],
        ), "fp32", 1,
    ),
    "held": (sparse(AlternateModules(period_steps=2)), "fp32", 1),
}  # fmt: skip
"""Config with one rule, kind of base, micro-batches of a step."""

SIZES = [300_000] * 30
"""Numbers of each parameter of the model that is large enough for several of DDP's buckets."""


class Counter:
    """Collectives of torch.distributed by name and bytes, within `counting`."""

    NAMES = (
        "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter",
        "reduce_scatter_tensor", "reduce_scatter_single", "reduce", "gather", "scatter", "all_to_all",
        "all_to_all_single", "send", "recv", "barrier", "all_gather_object", "broadcast_object_list",
        "_broadcast_coalesced",
    )  # fmt: skip

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.paused = False

    @contextmanager
    def counting(self):
        found = torch.distributed
        originals = {name: getattr(found, name) for name in self.NAMES if hasattr(found, name)}
        for name, original in originals.items():
            setattr(torch.distributed, name, self._counted(name, original))
        try:
            yield self.seen
        finally:
            for name, original in originals.items():
                setattr(torch.distributed, name, original)

    def _counted(self, name, original):
        def call(*args, **kwargs):
            if not self.paused:
                given = [*args, *kwargs.values()]
                tensors = [one for one in given if torch.is_tensor(one)]
                tensors += [t for one in given if isinstance(one, (list, tuple)) for t in one if torch.is_tensor(t)]
                sizes = [tensor.nbytes for tensor in tensors]
                self.seen.append((name, sum(sizes) if name == "_broadcast_coalesced" else max(sizes, default=0)))
            return original(*args, **kwargs)

        return call


def batch(number: int) -> dict[str, torch.Tensor]:
    rank = torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(10 * number + rank)
    ids = torch.randint(1, tiny.VOCAB, (BATCH, SEQ), generator=generator)
    return {"input_ids": ids, "labels": ids}


def moving(config, base: str, accumulation: int) -> dict[str, list]:
    """Collectives of rules, of DDP's gradients, and of its buffers, in a run with one move."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.base(base, compute_dtype=torch.bfloat16), copy.deepcopy(config))
    counter, buckets = Counter(), []
    ddp = DistributedDataParallel(model, find_unused_parameters=True)

    def hook(state, bucket):
        buckets.append(bucket.buffer().nbytes)
        counter.paused = True
        try:
            return allreduce_hook(state, bucket)
        finally:
            counter.paused = False

    ddp.register_comm_hook(None, hook)
    optimizer = AgedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    held = sum(buffer.nbytes for _, buffer in adapter_buffers(model))
    with counter.counting() as seen, Controller(ddp, optimizer, STEPS, accumulation=accumulation) as controller:
        for step in range(STEPS):
            controller.before_step()
            for number in range(accumulation):
                last = number == accumulation - 1
                with nullcontext() if last else ddp.no_sync():
                    ddp(**batch(accumulation * step + number)).loss.backward()
                if not last:
                    controller.after_micro_batch()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
        events = controller.events
    return {
        "rules": [one for one in seen if one[0] != "_broadcast_coalesced"],
        "buffers": [one for one in seen if one[0] == "_broadcast_coalesced"],
        "buffers of adapters": held,
        "buckets": buckets,
        "events": [event for event in events if event.get("replaced") or event.get("alive")],
    }


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in SIZES])

    def forward(self) -> torch.Tensor:
        total = 0
        for parameter in self.all:  # one after the other, so that gradients come from the last on
            total = (total + parameter.sum()) * 1.0
        return total


def moving_fsdp2() -> list:
    """Collectives of a run with one move over a sharded base."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.base("fp32"), copy.deepcopy(MOVING["accumulated"][0]))
    shard(model)
    optimizer = AgedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with Counter().counting() as seen, Controller(model, optimizer, STEPS) as controller:
        for step in range(STEPS):
            controller.before_step()
            model(**batch(step)).loss.backward()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
    return seen


def shard(model) -> None:
    own = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, ignored_params=own)
    fully_shard(model, ignored_params=own)


def ddp_buckets() -> list[int]:
    """Bytes of DDP's buckets at the second step, when they are final."""
    ddp, found = DistributedDataParallel(Many()), []

    def hook(state, bucket):
        found[-1].append(bucket.buffer().nbytes)
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, hook)
    for _ in range(2):
        found.append([])
        ddp().backward()
    return found[-1]


def fsdp2(base: str) -> dict:
    """A step of a fixed support over a sharded base."""
    torch.manual_seed(0)
    model = get_peft_model(tiny.base(base), sparse(target_modules="all-linear"))
    shard(model)
    shards = [p.to_local() for p in model.parameters() if isinstance(p.data, DTensor)]
    packed: dict[int, int] = {}

    def pack(tensor):
        for part in [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]:
            held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())
                    if not isinstance(t.data, DTensor)}  # fmt: skip
            storage = part.untyped_storage()
            if storage.data_ptr() not in held:
                packed[storage.data_ptr()] = storage.nbytes()
        return tensor

    model(**batch(0)).loss.backward()  # supports are decoded
    counter = Counter()
    with counter.counting() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch(1)).loss
        loss.backward()
    return {
        "collectives": seen,
        "shards": sum(shard.untyped_storage().nbytes() for shard in shards),
        "saved": sum(packed.values()),
        "buffers": sum({b.untyped_storage().data_ptr(): b.nbytes for b in model.buffers()}.values()),
    }


def told(case, *arguments):
    """What the case finds, or the error's text, so that the others are counted all the same."""
    try:
        return case(*arguments)
    except Exception:
        return traceback.format_exc()


def main(out: Path) -> None:
    torch.set_num_threads(1)
    tiny.base("nf4", compute_dtype=torch.bfloat16)  # transformers saves and loads on the first rank of a group alone
    torch.distributed.init_process_group("gloo")
    found = {"buckets": told(ddp_buckets), "moving over shards": told(moving_fsdp2)}
    found["moving"] = {name: told(moving, *case) for name, case in MOVING.items()}
    found["fsdp2"] = {base: told(fsdp2, base) for base in ("fp32", "bf16")}
    (out / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
