"""What every rank of `test_distributed.py` runs, and the single process it is compared with.

    torchrun --nproc_per_node 2 tests/training/ddp_script.py OUT '{"spiel-ag": {"density": 0.1}}' [fsdp]

For every method it writes `OUT/<method>-rank<r>.pt`: the adapter's tensors after every step, or the error's text.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tiny` is: this runs as a script, too
import fsdp_on_cpu
from training_toolbox import TokenData, tiny_llama

from hf_sparse_peft import calibrate, methods, trainer_options
from hf_sparse_peft.training.replicated import is_fully_sharded

STEPS, GLOBAL_BATCH = 10, 8
OWN = ("lora_", ".factored_", ".structured_")
"""Parts of names of what adapters hold."""
SHARDING: dict[str, dict | None] = {"ddp": None, "fsdp": fsdp_on_cpu.OPTIONS, "environment": {}}


class Recorder(TrainerCallback):
    """Copies of what moves, after every step; ranks draw from different global streams, so that none agrees by luck."""

    def __init__(self, rank: int, raises: bool = False) -> None:
        self.rank, self.raises = rank, raises
        self.steps: list[dict[str, torch.Tensor]] = []
        self.before: dict[str, torch.Tensor] = {}
        self.trains: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        torch.manual_seed(100 * state.global_step + self.rank)  # after the sampler's draw of the epoch
        self.before = self.tensors(model)
        if self.raises and state.global_step == 4:
            raise RuntimeError(f"rank {self.rank} alone")

    @staticmethod
    def tensors(model) -> dict[str, torch.Tensor]:
        named = {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
        return {name: tensor.detach().clone() for name, tensor in named.items() if any(part in name for part in OWN)}

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name.removeprefix("module."): one for name, one in model.named_parameters()}
        self.trains = {
            f"trains.{name}": torch.tensor(one.requires_grad)
            for name, one in named.items()
            if any(part in name for part in OWN)
        }

    def on_step_end(self, args, state, control, model=None, **kwargs):
        found = {**self.tensors(model), **self.trains}
        for name, _ in model.named_parameters():
            name = name.removeprefix("module.")
            factor, _, adapter = name.rpartition(".")
            if f"{factor}_map.{adapter}" in found:  # the entries of the experts that were drawn
                found[f"moved.{name}"] = found[name] != self.before[name]
        self.steps.append(found)


class Masked(torch.utils.data.Dataset):
    """Other data without a label."""

    def __init__(self, data: TokenData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        found = self.data[index]
        return {**found, "labels": torch.full_like(found["labels"], -100)}


def course(
    name: str, options: dict, out: Path, rank: int, world: int, sharding: dict | None = None
) -> list[dict[str, torch.Tensor]]:
    """One short run; `options` of the method, its name where the case has another, `layers` of the model, `arguments`
    of the training, `samples` of the data, the rank that all labels are `masked` on and the one that `raises`;
    `sharding` is for `TrainingArguments` too, None without."""
    options = dict(options)
    name, data = options.pop("method", name), TokenData(options.pop("samples", 96))
    if options.pop("masked", None) == rank and world > 1:
        data = Masked(data)
    raises = options.pop("raises", None)
    arguments = {**(sharding or {}), **options.pop("arguments", {})}
    accumulation = arguments.get("gradient_accumulation_steps", 1)
    base = tiny_llama(layers=options.pop("layers", 1))
    args = TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // world // accumulation,
        learning_rate=1e-2, weight_decay=0.1, save_strategy="no", report_to=[], logging_steps=1000,
        disable_tqdm=True, use_cpu=True, seed=11, lr_scheduler_type="constant", **arguments,
    )  # fmt: skip
    method = methods.get(name, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)  # the draw of low-rank factors
    model = get_peft_model(base, method.config)
    if getattr(method.config, "calibrates_sizes", False):
        calibrate(model, share_of(args, rank, world), show_progress=False)
    recorder = Recorder(rank, raises == rank)
    trainer = method.trainer_class(
        model=model, train_dataset=data, **trainer_options(model, args, method.trainer_class)
    )
    trainer.add_callback(recorder)
    trainer.train()
    assert is_fully_sharded(model) == (sharding is not None)
    return recorder.steps


def share_of(args: TrainingArguments, rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    """The rank's part of two global batches."""
    assert args.device.type == "cpu"  # asking for it starts the process group
    size = GLOBAL_BATCH // world
    parts = [TokenData().ids[begin + rank * size :][:size] for begin in (0, GLOBAL_BATCH)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in parts]


def main(out: Path, cases: dict[str, dict], kind: str = "ddp") -> None:
    """`kind`: "fsdp" by training arguments, "environment" for what that says, "ddp"."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if kind != "ddp":
        fsdp_on_cpu.allow()
    for name, options in cases.items():
        try:
            result = course(name, options, out, rank, world, copy.deepcopy(SHARDING[kind]))
        except Exception:
            result = traceback.format_exc()
        torch.save(result, out / f"{name}-rank{rank}.pt")
        if isinstance(result, str):
            print(f"{name} on rank {rank}: {result}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), *sys.argv[3:])
