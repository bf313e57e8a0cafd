"""Penalties on what trains: their gradients are added to the loss's once per optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import TrainingArguments

from ..rules.collectives import all_reduce_mean
from ..rules.no_effect import report_idle
from ..sparsity import stream_seed
from ..tuners.sparse_lora import SparseLoraConfig
from ..tuners.sparse_lora.l1 import add_l1_gradient, model_numbers
from .base import AdaptedLayer, ScheduleCallback


class PenaltyCallback(ScheduleCallback):
    """Base of the penalties.

    `add_gradient` is called at `on_pre_optimizer_step`: micro-batches are summed by then, ranks averaged and gradients
    clipped, so that neither accumulation nor clipping touches a penalty. None shows in the loss.
    """

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Add the gradients, in the units that the loss's gradient has at this point."""
        scale = gradient_scale(args, optimizer)
        for config in self.configs():
            self.add_gradient(config, state.global_step + 1, scale)

    def add_gradient(self, config: PeftConfig, update: int, scale: float) -> None:
        """Add `scale` times the penalty's gradient for optimizer step `update`, counted from 1."""
        raise NotImplementedError


def gradient_scale(args: TrainingArguments, optimizer: Any) -> float:
    """What the loss's gradients are multiplied by before an optimizer step: fp16's loss scale, unless clipping, which
    unscales them, has come before; else 1."""
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and not args.max_grad_norm else 1.0


class L1PenaltyCallback(PenaltyCallback):
    r"""Adds the gradient of :math:`\lambda \sum |p - p_0| / P` to adapters with `l1_penalty` (LT-SFT; Ansell et al.,
    2022). What does not train, a frozen unit, is not pulled."""

    option = "l1_penalty"

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0
        """`P`."""
        self.heads: dict[str, list[tuple[nn.Parameter, Tensor]]] = {}
        """Adapter -> trained numbers of its heads and where they started."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Find the layers and heads, and count the model."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.numbers = model_numbers(model)
        self.heads = {part.adapter: heads_of(model, part.adapter) for part in self.parts}

    def add_gradient(self, config: SparseLoraConfig, update: int, scale: float) -> None:
        """Pull everything that trains to its start."""
        weight, parts = scale * config.l1_penalty.weight / self.numbers, self.parts_of(config)
        for part in parts:
            distance = part.values.detach().clone()
            distance[: part.units.numel()][~part.trained] = 0
            # What changes the weight is the value times this: its sign is the value's, its slope the factor's size.
            factor = part.layer.sparse_lora_support_scaling[part.adapter]
            add_l1_gradient(part.values, distance, abs(factor) * weight)
        if config.l1_penalty.scope == "trained":
            for name in {part.adapter for part in parts}:
                for parameter, start in self.heads[name]:
                    add_l1_gradient(parameter, parameter.detach() - start, weight)


def heads_of(model: nn.Module, adapter: str) -> list[tuple[nn.Parameter, Tensor]]:
    """Trained numbers of an adapter's `modules_to_save`, with the base's own beside them."""
    pairs = []
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            start = dict(module.original_module.named_parameters())
            copies = module.modules_to_save[adapter].named_parameters()
            pairs += [(copy, start[name].detach()) for name, copy in copies if copy.requires_grad]
    return pairs


class NuclearNormCallback(PenaltyCallback):
    r"""Adds the gradient of :math:`\lambda\,\|P \odot M\|_*` of one random matrix to adapters with `nuclear_norm`
    (SaRA; Hu et al., 2025).

    The official code's lands on tensors that it does not train. The matrix is drawn from the step number, the same on
    all ranks.
    """

    option = "nuclear_norm"

    def check_length(self, config: SparseLoraConfig) -> None:
        """Some matrix must be large enough."""
        if not self._eligible(config):
            raise ValueError(
                f"nuclear_norm.min_side={config.nuclear_norm.min_side} leaves no matrix: none of the adapted ones has "
                "a shorter side above it. Lower it, or set nuclear_norm=None."
            )
        if config.nuclear_norm.interval > self.total_steps:
            raise ValueError(
                f"nuclear_norm.interval={config.nuclear_norm.interval} is more than the run's {self.total_steps} "
                "steps: the norm would never pull. Lower it, train longer, or set nuclear_norm=None."
            )

    def check_effect(self, config: SparseLoraConfig) -> None:
        """Name the matrices that are too small."""
        parts, eligible = self.parts_of(config), self._eligible(config)
        report_idle(
            [part.name for part in parts if part not in eligible],
            len(parts),
            f"nuclear_norm.min_side={config.nuclear_norm.min_side} is not below the shorter side, so the norm never "
            "pulls",
            "Lower min_side, or leave these modules out of target_modules.",
        )

    def add_gradient(self, config: SparseLoraConfig, update: int, scale: float) -> None:
        """Draw a matrix and pull it to low rank."""
        if update % config.nuclear_norm.interval:
            return
        parts = [part for part in self._eligible(config) if part.trains]
        if not parts:
            return
        seed = stream_seed(config.seed, "nuclear norm", update)
        drawn = int(torch.randint(len(parts), (), generator=torch.Generator().manual_seed(seed)))
        add_nuclear_norm_gradient(parts[drawn], scale)

    def _eligible(self, config: SparseLoraConfig) -> list[AdaptedLayer]:
        least = config.nuclear_norm.min_side
        return [part for part in self.parts_of(config) if min(part.layer.in_features, part.layer.out_features) > least]


@torch.no_grad()
def add_nuclear_norm_gradient(part: AdaptedLayer, scale: float = 1.0) -> None:
    """Add `scale * weight * (U V^T)` at the trained entries of one layer to its gradient, if it has one."""
    gradient: Any = part.values.grad
    if gradient is None:
        return
    trained, grid = part.trained, part.layer.sparse_lora_grid[part.adapter]
    base, values = support_weights(part)
    masked = torch.zeros(grid.rows, grid.cols, device=base.device)
    grid.scatter_add_(masked, part.units[trained], (base + values)[trained])
    direction = all_reduce_mean(grid.gather(_nuclear_gradient(masked), part.units))
    gradient[: base.shape[0]][trained] += (scale * part.config.nuclear_norm.weight * direction[trained]).to(gradient)


def support_weights(part: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """Base weights and deltas at the living entries, `[a]` fp32 both."""
    grid = part.layer.sparse_lora_grid[part.adapter]
    base = grid.gather(part.layer.dense_base_weight(), part.units).float()
    return base, part.values.detach()[: base.shape[0]].float()


def _nuclear_gradient(matrix: Tensor) -> Tensor:
    """`U V^T` over the singular values that are not zero: the subgradient of least norm."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    alive = s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps
    return (u * alive) @ vt
