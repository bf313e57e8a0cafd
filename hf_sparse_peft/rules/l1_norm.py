"""`L1Norm`: the plain L1 norm of what trains, weighted along a curve (L1-sparse unlearning)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..sparsity import Curve
from ..utils.option_types import PositiveFloat
from ..utils.parts import register_part
from .penalties import add_l1_gradient, pull_support
from .rule import Rule
from .run import Run


@register_part("l1_norm")
@dataclass(frozen=True)
class L1Norm(Rule):
    r"""Adds the gradient of :math:`\gamma_t \|\theta\|_1`, a sum over all trained numbers, to the loss's, once per
    optimizer step and after clipping: :math:`\gamma_t\,\mathrm{sign}(\theta)`, 0 at 0 (L1-sparse unlearning; Jia et
    al., 2023, "Model Sparsity Can Simplify Machine Unlearning").

    The sum is not divided by how many they are, so that a weight for one size of model is none for another
    (`L1Penalty` divides). What a mask removes is not pulled. None of it shows in the loss.
    """

    weight: PositiveFloat | Curve = 5e-4
    r""":math:`\gamma`, or a curve of it over the run's progress (the paper's decays linearly, epoch by epoch:
    `Staircase(Linear(5e-4, 0.0), epochs)`)."""
    of: Literal["weights", "update"] = "weights"
    r"""What :math:`\theta` is. "weights": the weights as they would be merged with this adapter, W + D of a masked
    adapter, and the biases, norms and heads that train, as in the paper. "update": the change alone, D or the values of
    a support, so that few weights move; biases and heads are not pulled."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"mask", "support"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self._weight(progress / 100) for progress in range(101)) < 0:
            raise ValueError(f"L1Norm.weight={self.weight} falls below 0, where it would push numbers away from 0.")

    def check(self, config: Any) -> None:
        """Refuse to take a support's base weights for something that trains, and updates that add nothing."""
        if "mask" not in config.unit_kinds:
            if self.of == "weights":
                raise ValueError(
                    "L1Norm.of='weights' is the norm of weights that train, and the base of a support does not. Set "
                    "of='update', or take MaskedLoraConfig."
                )
            if config.support_init != "zeros":
                raise ValueError(
                    f"L1Norm pulls the support's changes to 0, and with support_init={config.support_init!r} they do "
                    "not start there. Set support_init='zeros'."
                )
        elif self.of == "update" and not config.update.trained:
            raise ValueError(f"L1Norm.of='update' has nothing to pull in {config.update}. Set of='weights'.")

    def begin(self, run: Run) -> None:
        """Find what trains beside the adapter's tensors."""
        run.memory.others = trained_beside(run.model, run.adapter) if self.of == "weights" else []

    def gradients(self, run: Run) -> None:
        """Pull what trains to 0."""
        weight = run.gradient_scale * self._weight(run.step / run.total_steps)
        if not weight:
            return
        for space in run.spaces():
            if space.kind == "mask":
                space.add_l1_gradient(self.of, weight)
            else:
                pull_support(space, weight)
        for parameter in run.memory.others:
            if parameter.requires_grad:
                add_l1_gradient(parameter, parameter.detach(), weight)

    def _weight(self, progress: float) -> float:
        return self.weight(progress) if isinstance(self.weight, Curve) else self.weight


@torch.no_grad()
def trained_beside(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Trained parameters that are no tensors of adapters: biases, and the copies of `modules_to_save`."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    held = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    tensors = {id(p) for one in held if isinstance(one, nn.Module) for p in one.parameters()}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and id(parameter) not in tensors
        and (".modules_to_save." not in name or f".modules_to_save.{adapter}." in name)
    ]
