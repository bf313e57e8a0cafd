"""The pictures of "Supports and ranks that move": `python docs/pictures/draw.py` (a minute on one core, no network)."""

import tempfile
from pathlib import Path

import datasets
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_sparse_peft import (
    AgedAdamWSpec,
    Allocate,
    AverageRank,
    Prune,
    Regrow,
    SparseLoraConfig,
    SupportTelemetryCallback,
    trainer_options,
)
from hf_sparse_peft.training import draw_support_history

HERE = Path(__file__).parent
STEPS = 120
TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SUPPORT = SparseLoraConfig(
    r=0, density=0.02, schedule=[Prune(final_fraction=0.5), Regrow(every=12)], optimizer=AgedAdamWSpec(), **TARGETS
)
RANK = SparseLoraConfig(r=8, density=0, schedule=[Allocate(budget=AverageRank(4), every=6)], **TARGETS)


def draw(config: SparseLoraConfig, name: str, title: str) -> None:
    """Train a small Llama on sequences that count upwards, and draw what its adapter did."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)), config)
    starts = torch.randint(0, 64, (512, 1), generator=torch.Generator().manual_seed(0))
    rows = ((starts + torch.arange(16)) % 64).tolist()
    data = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    telemetry = SupportTelemetryCallback(every=6, write=False)
    with tempfile.TemporaryDirectory() as out:
        quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "logging_steps": 40}
        args = TrainingArguments(out, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=3e-3, **quiet)
        trainer = Trainer(model=model, train_dataset=data, **trainer_options(model, args))
        trainer.add_callback(telemetry)
        trainer.train()
    draw_support_history(telemetry.history, HERE / f"{name}.png", title)


if __name__ == "__main__":
    draw(SUPPORT, "support", "entries that are regrown and pruned")
    draw(RANK, "rank", "ranks under one budget of 4 a module")
