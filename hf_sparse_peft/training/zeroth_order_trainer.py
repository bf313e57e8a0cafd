"""`ZerothOrderTrainer`: Trainer's loop with two forward passes in the place of forward and backward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from ..optim.zeroth_order import ZerothOrderSGD, zeroth_order_groups
from ..optim.zeroth_order_log import LOG_NAME, ZerothOrderLog
from ..rules.collectives import all_reduce_mean
from ..rules.rule import why_not_without_gradients
from ..tuners import adapter_layers, restore_fp32
from ..tuners.shared.base_weight import keep_4bit_weight_stable
from .optimizers import make_optimizer
from .replicated import leave_adapters_whole, trains_adapters_alone
from .trainer_checks import sharding_switched_on

logger = logging.get_logger(__name__)


def zeroth_order_optimizer(model: nn.Module, args: TrainingArguments, **options: Any) -> ZerothOrderSGD:
    """`ZerothOrderSGD` on what trains in `model`; learning rate, decay and seed from Trainer's arguments."""
    options = {"lr": args.learning_rate, "seed": args.seed, **options}
    return ZerothOrderSGD(zeroth_order_groups(model, args.weight_decay), **options)


class ZerothOrderTrainer(Trainer):
    r"""MeZO (Malladi et al., 2023) and Sparse MeZO (Liu et al., 2024) under Trainer, for any trainable parameters: an
    adapter of any kind on a dense or 4-bit base, or a whole model.

    A training step evaluates the loss at :math:`\theta \pm \epsilon z` without gradients and in `eval()` mode (dropout
    off); the difference takes the gradient's place, so peak memory is that of an evaluation of the same batch. The
    logged loss is the mean of the two.

    - Gradient accumulation: every micro-batch is evaluated with the same `z`, and the differences of the losses, which
      Trainer scales as fractions of the whole batch's, are added: the step is that of the whole batch.
    - DDP, and FSDP2 for adapters: seeds are equal on all ranks, the difference is averaged over them, and no gradient
      is exchanged. (DDP itself allocates buckets of the trainable parameters' size.)
    - The learning rate is the scheduler's; the paper's is constant (`lr_scheduler_type="constant"`).
    - `max_grad_norm` has no meaning and is ignored; the logged `grad_norm` is |g|.
    - Resuming is exact: directions follow from seed and step, and Sparse MeZO's thresholds are saved with the
      optimizer.
    - `zeroth_order.log` in `output_dir` gets 28 to 36 bytes a step; `optim.replay(model, log)` walks the way again
      from the starting weights, without data.
    - Schedules that need gradients, or that freeze or kill entries, are refused.

    Args: as Trainer's. `optimizers` may hold a `ZerothOrderSGD` (`zeroth_order_optimizer`); without one, MeZO's
    defaults are taken, or what the adapter's config says (`ZerothOrderSpec`). `replay_log`: whether to write the log.

    Raises:
        ValueError: fp16 loss scaling, DataParallel, DeepSpeed, FSDP but for an adapter under FSDP2, or an adapter
            with such a schedule.
        TypeError: another optimizer.
    """

    def __init__(self, *args: Any, replay_log: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse_unsuited(self.args, self.model)
        restore_fp32(self.model)
        leave_adapters_whole(self.model)
        if self.optimizer is not None:
            zeroth_order_of(self.optimizer)
        self.add_callback(ZerothOrderCallback(replay_log))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """`ZerothOrderSGD` from the training arguments and the adapter's config, unless one was given.

        Raises:
            TypeError: the config asks for another optimizer.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            self.optimizer = make_optimizer(model, self.args) or zeroth_order_optimizer(model, self.args)
            zeroth_order_of(self.optimizer)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; where it is broken off, parameters come back from where the step under way had shifted them."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.optimizer is not None:
                zeroth_order_of(self.optimizer).abandon()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Evaluate one micro-batch on both sides; the last one of a step leaves the way back to the update."""
        optimizer = zeroth_order_of(self.optimizer)
        model.eval()
        inputs = self._prepare_inputs(inputs)
        losses = []
        for sign in (1, -1):
            with torch.no_grad(), optimizer.shifted(sign, model), self.compute_loss_context_manager():
                # A copy: compute_loss takes labels out of the batch where a loss function is given.
                losses.append(self._loss_of_step(model, dict(inputs), num_items_in_batch))
        if not self.accelerator.sync_gradients:
            optimizer.restore()
        both = all_reduce_mean(torch.stack([loss.detach().float() for loss in losses]))
        plus, minus = both.double().tolist()
        optimizer.add_difference(plus - minus)
        return both.mean().to(losses[0].dtype)

    def _loss_of_step(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        """The micro-batch's part of the step's loss, scaled as Trainer's own `training_step` scales it."""
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items)
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        return loss if scaled else loss / self.current_gradient_accumulation_steps

    def _clip_grad_norm(self, model: nn.Module) -> None:
        return None  # there is nothing to clip, and Trainer would look through all parameters

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        optimizer = zeroth_order_of(self.optimizer)
        return abs(optimizer.pending_gradient)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the last step's projected gradient, and with a mask the fraction of entries that it let move."""
        optimizer = self.optimizer and zeroth_order_of(self.optimizer)
        if "loss" in logs and optimizer and optimizer.last_update:
            logs["projected_gradient"] = optimizer.last_update["projected_gradient"]
            if optimizer.sparsity:
                logs["perturbed_share"] = optimizer.last_update["perturbed_share"]
        super().log(logs, start_time)


class ZerothOrderCallback(TrainerCallback):
    """Checks the model when training begins and writes the replay log; `ZerothOrderTrainer` adds it by itself."""

    def __init__(self, replay_log: bool = True) -> None:
        self.replay_log = replay_log
        self.log: ZerothOrderLog | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        """Refuse schedules that cannot run, keep 4-bit weights as they are, begin or continue the log."""
        for layer in adapter_layers(model):
            for name in layer.active_adapters:
                if name in layer.adapter_configs:
                    _refuse_schedules(layer.adapter_configs[name])
        for module in model.modules():  # forwards without gradients would repack 4-bit weights on a CPU
            keep_4bit_weight_stable(module)
        optimizer, self.log = zeroth_order_of(optimizer), None
        if optimizer.updates != state.global_step:
            logger.warning(
                f"The optimizer has taken {optimizer.updates} steps and the run {state.global_step}, so no replay log "
                "is written. Give every run a fresh optimizer, and resume from checkpoints with optimizer state."
            )
        elif self.replay_log and state.is_world_process_zero:
            try:
                self.log = ZerothOrderLog(Path(args.output_dir) / LOG_NAME, optimizer)
            except (ValueError, OSError) as error:
                logger.warning(f"{error} Training goes on without a replay log.")

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Log the step; say once that one was skipped."""
        update = zeroth_order_of(optimizer).last_update
        if not math.isfinite(update["projected_gradient"]):
            logger.warning_once(
                "A zeroth-order step met a loss that is not finite and left the weights alone. Lower epsilon or the "
                "learning rate if this goes on."
            )
        if self.log is not None:
            try:
                self.log.append(update)
            except OSError as error:
                logger.warning(f"The replay log ends here, training goes on: '{self.log.path}': {error}")
                self.log = None


def zeroth_order_of(optimizer: Any) -> ZerothOrderSGD:
    """The `ZerothOrderSGD` behind Accelerate's wrapper.

    Raises:
        TypeError: the optimizer is another one.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, ZerothOrderSGD):
        raise TypeError(
            f"ZerothOrderTrainer steps by loss differences, and {type(inner).__name__} by gradients. Set "
            "config.optimizer=ZerothOrderSpec(), or pass optimizers=(None, None) for MeZO's defaults."
        )
    return inner


def _refuse_unsuited(args: TrainingArguments, model: nn.Module) -> None:
    if args.fp16:
        raise ValueError(
            "fp16=True scales a loss for its backward pass, and zeroth-order training has none. Set bf16=True, or "
            "load the model in torch.float16 and set fp16=False."
        )
    sharded = sharding_switched_on(args)
    # FSDP2 leaves an adapter whole, as DDP does; a whole model that trains would not be sharded at all.
    if sharded is not None and not (sharded[0] == "FSDP2" and trains_adapters_alone(model)):
        raise ValueError(
            f"{sharded[0]} shards parameters, which are perturbed as wholes here; it is switched on by {sharded[1]}. "
            "Train with DDP or one device."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"DataParallel over {args.n_gpu} GPUs copies parameters in every forward. Start with `accelerate launch` "
            "or torchrun (DDP), or show one GPU to the process."
        )


def _refuse_schedules(config: Any) -> None:
    for rule in config.rules if config.has_schedule else ():
        if (reason := why_not_without_gradients(rule)) is not None:
            raise ValueError(
                f"{type(rule).__name__} {reason}; zeroth-order training has no gradients. Leave it out of schedule, or "
                "train with Trainer."
            )
