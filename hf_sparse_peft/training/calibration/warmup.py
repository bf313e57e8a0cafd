r"""LT-SFT's first phase: a dense fine-tuning of the targeted weights from which only magnitudes are kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...rules import L1Penalty
from ...rules.calibration_data import CalibrationData, endless, items_in
from ...rules.collectives import all_reduce_sum, world_size
from ...rules.penalties import add_l1_gradient, model_numel
from ...rules.probing import loss_of, modes_kept
from ...sparsity import make_curve
from ...sparsity.scores import Chunks
from ...sparsity.statistics import DeltaMagnitude
from ...sparsity.weight_statistics import State
from ...tuners.sparse_lora.layer import SparseLoraLayer
from .selection import SupportSelection


class DenseWarmup:
    r"""Trains dense fp32 deltas of `layers` on top of their frozen base, 4-bit ones included, and all other trainable
    parameters of `model` with them (LT-SFT, phase 1; Ansell et al., 2022).

    `train` is a warm-up, `train_chosen` a sparse phase between two warm-ups, of which the next one begins where it
    ended; `rewind` puts everything back to where the current iteration began, `reset` to the very start.

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
        self.numel = model_numel(model)
        self.deltas: list[torch.Tensor] = []
        self.sums: list[State] = []
        """What the criterion has added up of each layer's gradients, where it does (`collects_gradients`)."""
        self.reached: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """Module name -> the units and values that the sparse phases so far have come to."""
        self._reached_others = self.start
        self._masks: list[torch.Tensor] | None = None
        self._l1_weight, self._l1_on_others = criterion.l1, True

    def choose(
        self,
        data: CalibrationData,
        *,
        batches_per_step: int = 1,
        compute_loss: Callable | None = None,
        show_progress: bool = True,
    ) -> dict[str, torch.Tensor]:
        """All iterations: warm up, choose, train what is chosen. Returns the units of each module by its name, of the
        entries that moved furthest; the model is as it was, and `write_values` has what the sparse phases came to.

        Raises:
            ValueError: no batch, gradients that are not finite in more than half of the steps, or nothing moved.
        """
        criterion, layers, adapter_name = self.criterion, self.layers, self.adapter_name
        micro_batches = (
            endless(data, layers[0].get_base_layer_device()),
            batches_per_step,
            compute_loss,
            show_progress,
        )
        chosen: dict[str, torch.Tensor] = {}
        try:
            for iteration in range(criterion.n_iterations):
                if iteration:
                    self.train_chosen(chosen, *micro_batches)
                self.train(*micro_batches)
                fraction = (iteration + 1) / criterion.n_iterations
                selection = SupportSelection(self.model, layers, adapter_name, fraction)
                selection.add(self._scores(), chosen)
                selection.check_evidence(criterion.part_type)
                chosen = selection.units()
        except BaseException:
            self.reset()
            raise
        self.rewind()
        return chosen

    def _scores(self) -> dict[str, Chunks]:
        states = self.sums if self.criterion.collects_gradients else [{"sum": delta.detach()} for delta in self.deltas]
        return {
            layer.module_name: self.criterion.scores(state, layer.sparse_lora_grid[self.adapter_name])
            for layer, state in zip(self.layers, states, strict=True)
        }

    def train(
        self,
        data: Iterator[dict[str, Any]],
        batches_per_step: int = 1,
        compute_loss: Callable | None = None,
        show_progress: bool = True,
    ) -> None:
        """A warm-up of `warmup_steps` steps of `batches_per_step` batches from `data`, with a fresh optimizer.

        Raises:
            ValueError: the gradients of more than half of the steps are not finite; single ones are left out.
        """
        criterion = self.criterion
        self._open()
        self._masks, self._l1_weight, self._l1_on_others = None, criterion.l1, True
        micro_batches = (data, batches_per_step, compute_loss, show_progress)
        self._steps("Dense warm-up", criterion.warmup_steps, criterion.warmup_lr, *micro_batches)

    def train_chosen(
        self,
        units: dict[str, torch.Tensor],
        data: Iterator[dict[str, Any]],
        batches_per_step: int = 1,
        compute_loss: Callable | None = None,
        show_progress: bool = True,
    ) -> None:
        """A sparse phase: rewind, then train `units` (module name -> sorted units) and the other parameters.

        Raises:
            ValueError: the gradients of more than half of the steps are not finite; single ones are left out.
        """
        criterion, grids = self.criterion, [layer.sparse_lora_grid[self.adapter_name] for layer in self.layers]
        self._open()
        self._masks = []
        for layer, grid, delta in zip(self.layers, grids, self.deltas, strict=True):
            at = units[layer.module_name].to(delta.device)
            ones = torch.ones(grid.values_shape(at.numel()), device=delta.device)
            self._masks.append(grid.scatter_add_(torch.zeros_like(delta), at, ones).bool())
        rules = self.layers[0].adapter_configs[self.adapter_name].rules
        penalty = next((rule for rule in rules if isinstance(rule, L1Penalty)), None)
        self._l1_weight = penalty.weight if penalty else 0.0
        self._l1_on_others = penalty is not None and penalty.scope == "trained"
        micro_batches = (data, batches_per_step, compute_loss, show_progress)
        steps = criterion.sparse_steps or criterion.warmup_steps
        self._steps("Sparse phase", steps, criterion.sparse_lr or criterion.warmup_lr, *micro_batches)
        for layer, grid, delta in zip(self.layers, grids, self.deltas, strict=True):
            at = units[layer.module_name].to(delta.device)
            self.reached[layer.module_name] = (at, grid.gather(delta.detach(), at))
        self._reached_others = [p.detach().clone() for p in self.others]

    def rewind(self) -> None:
        """Take the deltas out and put every other parameter back to where the iteration began, bit for bit."""
        for layer in self.layers:
            layer.sparse_lora_dense_delta.pop(self.adapter_name, None)
        with torch.no_grad():
            for parameter, value in zip(self.others, self._reached_others, strict=True):
                parameter.copy_(value)
        self.deltas, self.sums = [], []

    def reset(self) -> None:
        """Forget the sparse phases, and put every other parameter back to its start."""
        self.reached, self._reached_others = {}, self.start
        self.rewind()

    @torch.no_grad()
    def write_values(self) -> None:
        """Give the chosen units of the layers, which must have their supports by now, the values of `reached`."""
        for layer in self.layers:
            if layer.module_name not in self.reached or self.adapter_name not in layer.sparse_lora_values:
                continue
            units, values = self.reached[layer.module_name]
            scale = layer.sparse_lora_support_scaling[self.adapter_name]
            living = layer.units(self.adapter_name)
            at = torch.searchsorted(living, units.to(living))
            layer.sparse_lora_values[self.adapter_name][at] = values / scale

    def _open(self) -> None:
        self.rewind()
        for layer in self.layers:
            delta = torch.zeros(layer.out_features, layer.in_features, device=layer.get_base_layer_device())
            if layer.module_name in self.reached:
                layer.sparse_lora_grid[self.adapter_name].scatter_add_(delta, *self.reached[layer.module_name])
            layer.sparse_lora_dense_delta[self.adapter_name] = delta.requires_grad_()
            self.deltas.append(delta)
            if self.criterion.collects_gradients:
                self.sums.append(self.criterion.start(*delta.shape, delta.device))

    def _steps(
        self,
        what: str,
        steps: int,
        lr: float,
        data: Iterator[dict[str, Any]],
        batches_per_step: int,
        compute_loss: Callable | None,
        show_progress: bool,
    ) -> None:
        optimizer = torch.optim.AdamW([*self.deltas, *self.others], lr=lr, betas=self.criterion.betas, weight_decay=0.0)
        curve = make_curve("linear", lr, 0.0)
        left_out = 0
        with modes_kept(self.model, training=True), torch.enable_grad():
            for step in tqdm(range(steps), desc=what, disable=not show_progress):
                micro_batches = [next(data) for _ in range(batches_per_step)]
                norm = self._gradients(micro_batches, compute_loss)
                left_out += not math.isfinite(norm)
                if 2 * left_out > steps:
                    raise ValueError(
                        f"{what}: the gradient is not finite in {left_out} of {step + 1} steps. Lower warmup_lr="
                        f"{self.criterion.warmup_lr} or sparse_lr={self.criterion.sparse_lr}; under fp16 use bf16 or "
                        "fp32."
                    )
                for group in optimizer.param_groups:
                    group["lr"] = curve(step / steps)
                if math.isfinite(norm) and norm > 0:  # without labels a step would only let moments decay
                    optimizer.step()
                optimizer.zero_grad()
        if left_out:
            warnings.warn(f"{what}: {left_out} of {steps} steps had no finite gradient and are left out.", stacklevel=2)

    def _gradients(self, micro_batches: list[dict[str, Any]], compute_loss: Callable | None) -> float:
        """Gradients of one step; returns the norm of the loss's, before penalty and clipping."""
        items = [items_in(batch, self.model) for batch in micro_batches]
        total = torch.tensor(sum(items), device=self.deltas[0].device)
        total = int(all_reduce_sum(total))
        for batch, count in zip(micro_batches, items, strict=True):
            loss = loss_of(self.model, batch, compute_loss)
            (loss * (count / total)).backward()
        trained = [p for p in (*self.deltas, *self.others) if p.grad is not None]
        if world_size() > 1:
            for parameter in trained:
                all_reduce_sum(parameter.grad)
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in trained]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        if math.isfinite(norm):
            self._collect()
        self._add_l1()
        if self._masks is not None:
            for delta, mask in zip(self.deltas, self._masks, strict=True):
                if delta.grad is not None:
                    delta.grad.mul_(mask)
        if self.criterion.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, self.criterion.max_grad_norm)
        return norm

    @torch.no_grad()
    def _collect(self) -> None:
        """Show the criterion the gradient of the loss, before anything is added to it or cut off."""
        for delta, state in zip(self.deltas, self.sums, strict=bool(self.sums)):
            if delta.grad is not None:
                self.criterion.update(state, self.criterion.reduce(delta.grad.clone()))

    def _add_l1(self) -> None:
        # Once a step: no accumulation or rank scales it.
        weight = self._l1_weight / self.numel
        pairs = [(delta, delta.detach()) for delta in self.deltas]
        if self._l1_on_others:
            pairs += [(p, p.detach() - before) for p, before in zip(self.others, self.start, strict=True)]
        for parameter, distance in pairs if weight else []:
            add_l1_gradient(parameter, distance, weight)
