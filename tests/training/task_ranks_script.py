"""What every rank of `test_task_mixture_ranks.py` runs, and the single process it is compared with.

torchrun --nproc_per_node 2 tests/training/task_ranks_script.py OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tiny` is: this runs as a script, too
import tiny

from hf_sparse_peft import StructuredConfig
from hf_sparse_peft.training import TaskCollator, TaskMixture
from hf_sparse_peft.tuners.structured import Hypernetwork

GLOBAL_BATCH, STEPS = 4, 6


def examples(size: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Token sequences of one task."""
    ids = torch.randint(1, tiny.VOCAB, (size, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of one length."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Seeing(Trainer):
    """Keeps the task of every step."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs["task"])
        return super().training_step(model, inputs, *args, **kwargs)


def main(out: Path) -> None:
    """Train, and write what this rank has and saw."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    form = Hypernetwork(("a", "b"), 8, embedding=4, hidden=8, projected=4)
    config = StructuredConfig(form=form, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.llama(layers=2), config)
    parallel = {"ddp_find_unused_parameters": True, "ddp_backend": "gloo"} if world > 1 else {}
    args = TrainingArguments(
        str(out / f"run{world}"), max_steps=STEPS, per_device_train_batch_size=GLOBAL_BATCH // world,
        learning_rate=1e-2, lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=True, remove_unused_columns=False, train_sampling_strategy="sequential", **parallel,
    )  # fmt: skip
    data = TaskMixture({"a": examples(20, 1), "b": examples(9, 2)}, GLOBAL_BATCH, batches=STEPS)
    trainer = Seeing(model, args, train_dataset=data, data_collator=TaskCollator(collate))
    trainer.seen = []
    trainer.train()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".structured_" in name}
    torch.save({"tasks": trainer.seen, "tensors": tensors}, out / f"world{world}-rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
