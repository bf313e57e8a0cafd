"""What every rank of `test_ranks.py` runs: `python tests/training/ranks_script.py OUT '["case"]'`.

Writes `OUT/<case>-rank<r>.pt`: what the case returns, or the error's text.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tiny` is: this runs as a script, too
from training_toolbox import TokenData, tiny_llama

from hf_sparse_peft import Controller, Regrow, SparseLoraConfig, adapter_parameters
from hf_sparse_peft.optim import AgedAdamW
from hf_sparse_peft.rules import Gradient


def rank() -> int:
    return torch.distributed.get_rank()


def adapted(seed: int = 0, density: float = 0.1, **options):
    """A model whose factors and support are drawn from `seed`."""
    config = SparseLoraConfig(
        r=2, density=density, criterion="random", seed=seed, target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM", **{"schedule": [Regrow(every=2, grow=Gradient())], **options},
    )  # fmt: skip
    base = tiny_llama()
    torch.manual_seed(seed)  # the draw of factors
    return get_peft_model(base, config)


def shard(model):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, ignored_params=adapter_parameters(model))
    return fully_shard(model, ignored_params=adapter_parameters(model))


def state(model) -> dict[str, torch.Tensor]:
    named = {name.removeprefix("module."): one for name, one in model.state_dict().items()}
    return {name: one.detach().clone() for name, one in named.items() if "sparse_lora" in name}


def train(model, steps: int = 5, batch=None) -> dict[str, torch.Tensor]:
    """A loop of one's own; `batch(step)` is this rank's."""
    ids = TokenData(8 * steps).ids.view(steps, torch.distributed.get_world_size(), -1, 10)
    optimizer = AgedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with Controller(model, optimizer, total_steps=steps) as rules:
        for step in range(steps):
            rules.before_step()
            mine = ids[step, rank()] if batch is None else batch(step)
            model(input_ids=mine, labels=mine).loss.backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
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


CASES = {
    "unlike-ddp": lambda: unlike(DistributedDataParallel),
    "unlike-fsdp2": lambda: unlike(shard),
    "shapes-ddp": lambda: other_shapes(DistributedDataParallel),
    "shapes-fsdp2": lambda: other_shapes(shard),
}


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
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
