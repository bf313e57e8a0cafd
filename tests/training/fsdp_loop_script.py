"""A loop with accelerate and `Controller`, which `test_fsdp_loop.py` runs in two processes under FSDP2, switched on by
the environment, and in one without: `python tests/training/fsdp_loop_script.py OUT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tiny` is: this runs as a script, too
import fsdp_on_cpu
from training_toolbox import TokenData, tiny_llama

from hf_sparse_peft import (
    AccumulatedGradient,
    AgedAdamWSpec,
    Controller,
    Regrow,
    SparseLoraConfig,
    leave_adapters_whole,
    make_optimizer,
)
from hf_sparse_peft.training.replicated import is_fully_sharded

STEPS, MICRO_BATCHES, GLOBAL_BATCH = 9, 2, 8


def main(out: Path) -> None:
    """Train, and write the adapter's tensors after every step."""
    torch.set_num_threads(1)
    fsdp_on_cpu.allow()
    accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES, cpu=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    config = SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", optimizer=AgedAdamWSpec(),
        schedule=[Regrow(every=3, grow=AccumulatedGradient(steps=2))],
    )  # fmt: skip
    base = tiny_llama(layers=2)
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    leave_adapters_whole(model)
    model, optimizer = accelerator.prepare(model, make_optimizer(model, lr=1e-2))
    assert is_fully_sharded(model) == ("ACCELERATE_USE_FSDP" in os.environ)
    ids = TokenData(STEPS * GLOBAL_BATCH).ids.view(STEPS, MICRO_BATCHES, world, -1, 10)
    steps, torch_ids = [], ids[:, :, rank]
    with Controller(model, optimizer, total_steps=STEPS, accumulation=MICRO_BATCHES) as rules:
        model.train()
        for step in torch_ids:
            for part in step:
                with accelerator.accumulate(model):
                    rules.before_step()
                    accelerator.backward(model(input_ids=part, labels=part).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    rules.after_step() if accelerator.sync_gradients else rules.after_micro_batch()
                    optimizer.zero_grad()
            held = {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
            steps.append({name: tensor.clone() for name, tensor in held.items() if "sparse_lora" in name})
    assert len(rules.events) >= 3
    torch.save(steps, out / f"steps-{world}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
