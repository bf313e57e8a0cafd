"""What every rank of `test_fsdp_resume.py` runs: one run after the other, each of which writes what it ended with.

torchrun --nproc_per_node 2 tests/training/fsdp_resume_script.py '[{"out": "a", "steps": 8}]'
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
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tiny` is: this runs as a script, too
import fsdp_on_cpu
from training_toolbox import TokenData, tiny_llama

from hf_sparse_peft import (
    AccumulatedGradient,
    AgedAdamWSpec,
    Prune,
    Regrow,
    SampleLayers,
    SparseLoraConfig,
    methods,
    trainer_options,
)
from hf_sparse_peft.training.replicated import is_fully_sharded

GLOBAL_BATCH = 8
SCHEDULES = {
    "regrow": lambda: [Regrow(every=3, grow=AccumulatedGradient(steps=2))],
    "prune": lambda: [Prune(final_fraction=0.5, every=2, start=0.0, end=0.8)],
    "sample": lambda: [SampleLayers(trained=0.5, every=4, probes=2)],
}


def config_of(schedule: str, head: bool) -> SparseLoraConfig:
    """With a head of its own if asked for."""
    if schedule == "losia":  # keeps state that is there at some steps only
        return methods.get("losia", every=3, rate="rewarm", target_modules=["q_proj"], task_type="CAUSAL_LM").config
    return SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM",
        schedule=SCHEDULES[schedule](), optimizer=AgedAdamWSpec(), modules_to_save=["lm_head"] if head else None,
    )  # fmt: skip


def run(
    out: str,
    steps: int = 8,
    resume: str | None = None,
    kind: str = "FULL_STATE_DICT",
    schedule: str = "regrow",
    head: bool = False,
) -> dict[str, torch.Tensor]:
    """Train for `steps` steps with a checkpoint after 4, or go on from `resume`; the adapter's tensors at the end."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = copy.deepcopy(fsdp_on_cpu.OPTIONS) if "RANK" in os.environ else {}
    if options:
        options["fsdp_config"]["state_dict_type"] = kind
    args = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=GLOBAL_BATCH // world, learning_rate=1e-2, save_steps=4,
        report_to=[], logging_steps=1000, disable_tqdm=True, use_cpu=True, seed=11, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(layers=2), config_of(schedule, head))
    trainer = Trainer(model=model, train_dataset=TokenData(), **trainer_options(model, args))
    trainer.train(resume_from_checkpoint=resume)
    assert is_fully_sharded(model) == bool(options)
    trainer.save_model(f"{out}/end")
    held = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in held.items() if "sparse_lora" in name or "modules_to_save" in name}


if __name__ == "__main__":
    torch.set_num_threads(1)
    fsdp_on_cpu.allow()
    for one in json.loads(sys.argv[1]):
        file = Path(one["out"]) / f"end-{os.environ.get('RANK', '')}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(run(**one), file)
        except Exception:
            torch.save(traceback.format_exc(), file)
            print(one, traceback.format_exc(), file=sys.stderr)
