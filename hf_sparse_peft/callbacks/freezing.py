"""SaRA's two schedules: entries that grew past a threshold freeze, and a nuclear norm pulls the others to low rank."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..optim import restart_optimizer_state
from ..sparsity import stream_seed
from ..tuners.sparse_lora import SparseLoraConfig
from .base import AdaptedLayer, ScheduleCallback, all_reduce_mean
from .frozen_units import FrozenUnits
from .support_moves import refuse_unskippable, skip_update


class ThresholdFreezingCallback(ScheduleCallback):
    r"""Freezes entries that grew past the threshold, for adapters that set `freezing` (SaRA; Hu et al., 2025).

    At step `round(freezing.at * T)` the support `M0` splits: entries with :math:`|w + \delta| < \tau` go on training
    with fresh optimizer state (`M1`), the others keep their value from then on. `w` is the base weight, dequantised
    where it is 4-bit. Weight decay pulls deltas to 0, that is, weights to their pretrained values; the official code,
    which trains the weights themselves, pulls these to 0.
    """

    option = "freezing"

    def __init__(self) -> None:
        super().__init__()
        self.guard = FrozenUnits()
        self.frozen: list[dict[str, int]] = []
        """One record an adjustment: step, entries frozen, entries that go on."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Find the layers and check the step of the adjustment."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.guard.attach(self.parts)
        for config in self.configs():
            if config.freezing.skip_step:
                refuse_unskippable(args, "freezing")

    def check_length(self, config: SparseLoraConfig) -> None:
        """There must be steps before and after the adjustment."""
        update = self._update_of(config)
        if not 1 < update < self.total_steps:
            raise ValueError(
                f"freezing.at={config.freezing.at} of a run of {self.total_steps} steps is step {update}, which leaves "
                "none before or after it. Train longer, or set freezing=None."
            )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Keep frozen values aside, and leave out the update that an adjustment replaces."""
        due = [config for config in self.configs() if self._update_of(config) == state.global_step + 1]
        if any(config.freezing.skip_step for config in due):
            skip_update(optimizer)
        self.guard.save()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Put frozen values back."""
        self.guard.restore()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Freeze what grew past the threshold."""
        due = [part for part in self.parts if self._update_of(part.config) == state.global_step]
        if not due:
            return
        frozen = sum(freeze_past_threshold(part) for part in due)
        alive = sum(part.trained_units.numel() for part in due)
        for part in due:
            restart_optimizer_state(optimizer, part.values)
        self.frozen.append({"step": state.global_step, "frozen": frozen, "alive": alive})
        if not alive:
            warnings.warn(
                "Every entry of the support grew past its threshold: nothing of it trains from here on. Raise "
                "freezing.threshold or lower the learning rate.",
                stacklevel=2,
            )

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Free the marks once the last step is done."""
        self.guard.detach()
        super().on_train_end(args, state, control, **kwargs)

    def _update_of(self, config: SparseLoraConfig) -> int:
        return round(config.freezing.at * self.total_steps)


@torch.no_grad()
def freeze_past_threshold(part: AdaptedLayer) -> int:
    """Mark the trained entries of one layer with |w + delta| at the threshold or above; returns how many."""
    base, values = _support_weights(part)
    threshold = part.config.freezing.threshold
    past = (base + values).abs() >= threshold if threshold is not None else (base + values).abs() > base.abs().max()
    past &= part.trained
    part.layer.sparse_lora_frozen[part.adapter][: past.numel()][past] = 1
    return int(past.sum())


def _support_weights(part: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """Base weights and deltas at the living entries, `[a]` fp32 both."""
    grid = part.layer.sparse_lora_grid[part.adapter]
    base = grid.gather(part.layer.dense_base_weight(), part.units).float()
    return base, part.values.detach()[: base.shape[0]].float()


class NuclearNormCallback(ScheduleCallback):
    r"""Adds the gradient of :math:`\lambda\,\|P \odot M\|_*` of one random matrix to adapters with `nuclear_norm`.

    Once per optimizer step, whatever the accumulation, to the gradients the optimizer reads (the official code's lands
    on tensors that it does not train). The matrix is drawn from the step number, the same on all ranks.
    """

    option = "nuclear_norm"

    def check_length(self, config: SparseLoraConfig) -> None:
        """Some matrix must be large enough."""
        if not self._eligible(config):
            raise ValueError(
                f"nuclear_norm.min_side={config.nuclear_norm.min_side} leaves no matrix: none of the adapted ones has "
                "a shorter side above it. Lower it, or set nuclear_norm=None."
            )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Add the gradient, in the units that the loss's gradient has at this point."""
        update = state.global_step + 1
        scaler = getattr(optimizer, "scaler", None)
        # Clipping unscales gradients first; without it they still carry fp16's loss scale.
        scale = float(scaler.get_scale()) if scaler is not None and not args.max_grad_norm else 1.0
        for config in self.configs():
            if update % config.nuclear_norm.interval:
                continue
            parts = self._eligible(config)
            seed = stream_seed(config.seed, "nuclear norm", update)
            drawn = int(torch.randint(len(parts), (), generator=torch.Generator().manual_seed(seed)))
            add_nuclear_norm_gradient(parts[drawn], scale)

    def _eligible(self, config: SparseLoraConfig) -> list[AdaptedLayer]:
        return [
            part
            for part in self.parts
            if part.config is config
            and min(part.layer.in_features, part.layer.out_features) > config.nuclear_norm.min_side
        ]


@torch.no_grad()
def add_nuclear_norm_gradient(part: AdaptedLayer, scale: float = 1.0) -> None:
    """Add `scale * weight * (U V^T)` at the trained entries of one layer to its gradient, if it has one."""
    gradient: Any = part.values.grad
    if gradient is None:
        return
    trained, grid = part.trained, part.layer.sparse_lora_grid[part.adapter]
    base, values = _support_weights(part)
    masked = torch.zeros(grid.rows, grid.cols, device=base.device)
    grid.scatter_add_(masked, part.units[trained], (base + values)[trained])
    direction = all_reduce_mean(grid.gather(_nuclear_gradient(masked), part.units))
    gradient[: base.shape[0]][trained] += (scale * part.config.nuclear_norm.weight * direction[trained]).to(gradient)


def _nuclear_gradient(matrix: Tensor) -> Tensor:
    """`U V^T` over the singular values that are not zero: the subgradient of least norm."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    alive = s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps
    return (u * alive) @ vt
