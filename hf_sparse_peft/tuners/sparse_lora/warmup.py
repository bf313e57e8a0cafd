r"""LT-SFT's first phase: a dense fine-tuning of the targeted weights from which only magnitudes are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...sparsity import make_schedule
from ...sparsity.statistics import DeltaMagnitude
from .calibration_data import CalibrationData, items_in, loss_of, modes_kept
from .l1 import add_l1_gradient, model_numbers
from .layer import SparseLoraLayer
from .readers import all_reduce_sum, on_every_rank, world_size


class DenseWarmup:
    r"""Trains dense fp32 deltas of `layers` on top of their frozen base, 4-bit ones included, and all other trainable
    parameters of `model` with them; `rewind` puts everything back (LT-SFT, phase 1; Ansell et al., 2022).

    Own AdamW (no weight decay) whose learning rate falls linearly to 0. The model trains in training mode, dropout
    included. Memory: 16 bytes a targeted entry (delta, gradient, two moments), as fine-tuning the whole weights takes.
    """

    def __init__(
        self, model: nn.Module, layers: list[SparseLoraLayer], adapter_name: str, criterion: DeltaMagnitude
    ) -> None:
        self.model, self.layers, self.adapter_name, self.criterion = model, layers, adapter_name, criterion
        held = {id(layer.sparse_lora_values[adapter_name]) for layer in layers}
        self.others = [p for p in model.parameters() if p.requires_grad and id(p) not in held]
        self.start = [p.detach().clone() for p in self.others]
        self.numel = model_numbers(model)
        self.deltas: list[torch.Tensor] = []

    def train(
        self,
        data: Iterator[dict[str, Any]],
        batches_per_step: int = 1,
        compute_loss: Callable | None = None,
        show_progress: bool = True,
    ) -> None:
        """`warmup_steps` steps of `batches_per_step` batches from `data`, with fresh deltas and a fresh optimizer.

        Raises:
            ValueError: the loss of a step is not finite.
        """
        self._open()
        criterion = self.criterion
        optimizer = torch.optim.AdamW([*self.deltas, *self.others], lr=criterion.warmup_lr, weight_decay=0.0)
        curve = make_schedule("linear", criterion.warmup_lr, 0.0)
        with modes_kept(self.model, training=True), torch.enable_grad():
            for step in tqdm(range(criterion.warmup_steps), desc="Dense warm-up", disable=not show_progress):
                micro_batches = [next(data) for _ in range(batches_per_step)]
                self._gradients(micro_batches, compute_loss)
                for group in optimizer.param_groups:
                    group["lr"] = curve(step / criterion.warmup_steps)
                optimizer.step()
                optimizer.zero_grad()

    def rewind(self) -> None:
        """Take the deltas out and put every other parameter back, bit for bit."""
        for layer in self.layers:
            layer.sparse_lora_dense_delta.pop(self.adapter_name, None)
        with torch.no_grad():
            for parameter, value in zip(self.others, self.start, strict=True):
                parameter.copy_(value)
        self.deltas = []

    def _open(self) -> None:
        self.rewind()
        for layer in self.layers:
            delta = torch.zeros(layer.out_features, layer.in_features, device=layer.get_base_layer_device())
            layer.sparse_lora_dense_delta[self.adapter_name] = delta.requires_grad_()
            self.deltas.append(delta)

    def _gradients(self, micro_batches: list[dict[str, Any]], compute_loss: Callable | None) -> None:
        items = [items_in(batch, self.model) for batch in micro_batches]
        total = torch.tensor(sum(items), device=self.deltas[0].device)
        total = int(all_reduce_sum(total))
        for batch, count in zip(micro_batches, items, strict=True):
            loss = loss_of(self.model, batch, compute_loss)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"The loss of the warm-up is {float(loss)}. Lower warmup_lr={self.criterion.warmup_lr}."
                )
            (loss * (count / total)).backward()
        trained = [p for p in (*self.deltas, *self.others) if p.grad is not None]
        if world_size() > 1:
            for parameter in trained:
                all_reduce_sum(parameter.grad)
        self._add_l1()
        if self.criterion.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, self.criterion.max_grad_norm)

    def _add_l1(self) -> None:
        # Once a step: no accumulation or rank scales it.
        weight = self.criterion.l1 / self.numel
        pairs = [(delta, delta.detach()) for delta in self.deltas]
        pairs += [(p, p.detach() - before) for p, before in zip(self.others, self.start, strict=True)]
        for parameter, distance in pairs if weight else []:
            add_l1_gradient(parameter, distance, weight)


def endless(data: CalibrationData, device: torch.device) -> Iterator[dict[str, Any]]:
    """The batches of `data` over and over; ranks start a new pass together.

    Raises:
        ValueError: there is no batch.
    """
    for batches in data.epochs():
        seen = False
        while on_every_rank((batch := next(batches, None)) is not None, device):
            seen = True
            yield batch
        if not seen:
            raise ValueError("The dataloader has no batch to warm up on.")
