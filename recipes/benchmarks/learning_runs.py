"""One run of `learning.py`: a candidate of equal numbers on a fresh base, trained at one rate, and scored."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

HOPELESS = 1.25


class StopHopeless(TrainerCallback):
    """Stop a run that does not learn: when the mean training loss of a quarter of its steps is over `HOPELESS` times
    that of its first twentieth, or no number. A quarter, since the mean of a few small batches says little."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.stopped_at: int | None = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        """Compare the last losses that were logged, each of a twentieth of the run, with the first one."""
        if "loss" not in (logs or {}):
            return
        self.losses.append(float(logs["loss"]))
        last = self.losses[-5:]
        mean = sum(last) / len(last)
        rises = len(self.losses) > len(last) and mean > HOPELESS * self.losses[0]
        if rises or not math.isfinite(mean):
            self.stopped_at, control.should_training_stop = state.global_step, True


def budget(task: Any, rank: int, steps: int) -> dict[str, float]:
    """What `$name` means in a candidate: LoRA of `rank` sets the numbers in the targeted linears."""
    lora = harness.build_method("lora:r=1", target_modules=task.targets, task_type=task.task_type).config
    model = get_peft_model(task.model(), lora)
    one = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    layers = [m.get_base_layer() for m in model.modules() if hasattr(m, "get_base_layer")]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    half, low = rank // 2, max(rank // 4, 1)
    return {
        "low": low, "high": rank - low, "high_rest": (rank - low) * one,
        "rank": rank, "alpha": 2 * rank, "half": half, "double": 2 * rank, "more": rank + half, "blocks": 4 * rank,
        "numbers": rank * one, "rest": (rank - half) * one, "share": round(math.sqrt(rank * one / weights), 4),
        "sparsity": round(1 - rank * one / weights, 6),
        "every": max(steps // 10, 1), "fifth": max(steps // 5, 1), "middle": steps // 2,
    }  # fmt: skip


def in_head(name: str, task: Any) -> bool:
    """Whether a parameter is the task's new head, by its name."""
    return bool(task.head) and any(part in name.split(".") for part in ("modules_to_save", *task.head))


def with_head_rate(
    own: torch.optim.Optimizer | None, model: nn.Module, args: TrainingArguments, task: Any
) -> torch.optim.Optimizer | None:
    """The method's own optimizer, or Trainer's, with the new head in groups at its rate; `own` without a head."""
    head = {id(p) for name, p in model.named_parameters() if in_head(name, task)}
    if not head:
        return own
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = own or torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    for group in list(optimizer.param_groups):
        new = [p for p in group["params"] if id(p) in head]
        group["params"] = [p for p in group["params"] if id(p) not in head]
        if new:
            optimizer.add_param_group({**group, "params": new, "lr": task.head_rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


class FullFineTuning:
    """All parameters, as a method: what `harness.make_trainer` asks of one."""

    trainer_class = Trainer

    def optimizer(self, model: nn.Module, args: TrainingArguments) -> None:
        """Trainer's own."""

    def callbacks(self, model: nn.Module) -> list[TrainerCallback]:
        """None."""
        return []


def adapted(text: str, task: Any, numbers: dict[str, float], seed: int) -> tuple[Any, nn.Module]:
    """The candidate's method, and a fresh base with its adapter."""
    set_seed(seed)
    if text == "full":
        return FullFineTuning(), task.model().float()  # as adapters train in fp32 on every base
    common = {"target_modules": task.targets, "task_type": task.task_type}
    if task.head:  # elsewhere a method's own modules train in full, such as norms
        common["modules_to_save"] = task.head
    method = harness.build_method(text, numbers, seed, **common)
    model = get_peft_model(task.model(), method.config)
    method.prepare(model)
    return method, model


def trained_numbers(model: nn.Module, task: Any) -> int:
    """Trained numbers, the head's left out."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not in_head(name, task))


def train(model: nn.Module, method: Any, task: Any, options: Any, rate: float, seed: int) -> dict[str, Any]:
    """Train for `options.steps`, or until the run is hopeless; the mean training loss, and where it stopped."""
    stop, folder = StopHopeless(), (options.output or Path("runs/learning")) / "run"
    args = harness.training_arguments(
        options, folder, rate, seed,
        per_device_train_batch_size=options.batch_size,
        warmup_steps=max(1, options.steps // 20),
        train_sampling_strategy="group_by_length",  # less padding
        logging_steps=max(1, options.steps // 20),
        logging_nan_inf_filter=False,  # else such losses are logged as 0
    )  # fmt: skip
    more = task.training_data(seed)
    more["adjust_optimizer"] = partial(with_head_rate, model=model, args=args, task=task)
    trainer = harness.make_trainer(method, model, args, callbacks=[stop], **more)
    loss = trainer.train().training_loss
    return {"train_loss": loss} | ({"stopped_at": stop.stopped_at} if stop.stopped_at else {})


def run(text: str, task: Any, options: Any, numbers: dict[str, float], rate: float, seed: int) -> dict[str, Any]:
    """Train one candidate once and score it; with a second task, train it on that too, and score it on both."""
    start = time.perf_counter()
    method, model = adapted(text, task, numbers, seed)
    row = {"trained": trained_numbers(model, task), **train(model, method, task, options, rate, seed)}
    row |= task.score(model)
    if second := getattr(task, "second", None):
        row |= {f"second_{key}": value for key, value in train(model, method, second, options, rate, seed).items()}
        first, after, now = row["score"], task.score(model), second.score(model)
        row |= {key: (after[key] + now[key]) / 2 for key in ("choose", "score", "test_loss", "kl")}
        row |= {"held_out_loss": now["held_out_loss"], "first_before": first, "first_after": after["score"]}
        row["second"] = now["score"]
    return row | {"seconds": round(time.perf_counter() - start, 1)}
