"""What every rank of `test_distributed.py` runs; also a single process, for comparison.

    torchrun --nproc_per_node 2 tests/callbacks/ddp_script.py OUT CASE

writes `OUT/rank<r>.pt`: after every step the supports, values, ranks and ages, and what the callbacks recorded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from callback_toolbox import TokenData, tiny_llama
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sparse_peft import methods

STEPS, GLOBAL_BATCH = 10, 8


class Recorder(TrainerCallback):
    """Copies of what moves, after every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        kept = {k.removeprefix("module."): v.detach().clone() for k, v in model.state_dict().items() if "lora_" in k}
        self.steps.append(kept)


def main(out: Path, case: dict) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    args = TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // world, learning_rate=1e-2,
        weight_decay=0.1, save_strategy="no", report_to=[], logging_steps=1000, disable_tqdm=True, use_cpu=True,
        seed=11, lr_scheduler_type="constant", ddp_backend="gloo", **case.get("arguments", {}),
    )  # fmt: skip
    method = methods.get(case["name"], target_modules=["q_proj", "v_proj", "down_proj"], **case["options"])
    base = tiny_llama()
    # Ranks that draw from the global stream must not agree by luck.
    torch.manual_seed(1)
    model = get_peft_model(base, method.config)
    torch.manual_seed(100 + rank)
    recorder = Recorder()
    trainer = method.trainer_class(
        model=model, args=args, train_dataset=TokenData(), callbacks=[*method.callbacks(model), recorder],
        optimizers=(method.optimizer(model, args), None),
    )  # fmt: skip
    assert isinstance(trainer, Trainer)
    trainer.train()
    torch.save(recorder.steps, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
