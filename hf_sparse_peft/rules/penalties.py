"""Penalties on what trains: `L1Penalty` and `NuclearNorm` add their gradients to the loss's, once per optimizer step.

In `Rule.gradients` micro-batches are summed, ranks averaged and gradients clipped, so that neither accumulation nor
clipping touches a penalty. None shows in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from ..sparsity import stream_seed
from ..utils.option_types import NonNegativeInt, PositiveFloat, PositiveInt
from ..utils.parts import register_part
from .collectives import all_reduce_mean
from .no_effect import report_idle
from .rule import Rule, check_entries
from .run import Run
from .space import UnitSpace


@register_part("l1_penalty")
@dataclass(frozen=True)
class L1Penalty(Rule):
    r"""A pull to the start, :math:`\lambda \sum |p - p_0| / P` over trained numbers, `P` all numbers of the model
    (LT-SFT; Ansell et al., 2022).

    The support's changes start at 0; a head of `modules_to_save` starts at the weights that peft keeps beside it:
    where the base draws its head anew, draw it from the same seed to resume a run. A low-rank half is not pulled, and
    what is not updated, a frozen unit, neither.

    With `scope="gate"` it pulls the gates of low-rank components to 0 instead, and `P` is the number of these (SoRA's
    released code; Ding et al., 2023).
    """

    weight: PositiveFloat = 0.1
    r""":math:`\lambda` (LT-SFT: 0.1 for languages; tasks have none; SoRA's gates: 10)."""
    scope: Literal["trained", "support", "gate"] = "trained"
    """Whether heads of `modules_to_save` are pulled too, or the support's changes only, or gates."""

    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})

    @property
    def acts_on(self) -> frozenset[str]:
        """Supports, or low-rank components."""
        return frozenset({"rank" if self.scope == "gate" else "support"})

    def check(self, config: Any) -> None:
        """Refuse an adapter without a gate, or of which something trains that started nobody knows where."""
        if self.scope == "gate":
            if not config.gated:
                raise ValueError("L1Penalty.scope='gate' pulls gates, and gate=None. Set gate, or add ProximalGate.")
            return
        if not config.has_support or config.support_init != "zeros":
            raise ValueError(
                f"L1Penalty pulls the support's changes to 0, and density={config.density}, support_init="
                f"{config.support_init!r} leave no support that starts there. Set density > 0 and support_init='zeros'."
            )
        if self.scope == "trained" and config.bias != "none":
            raise ValueError(
                f"L1Penalty pulls what trains to its start, and nothing keeps that of biases (bias={config.bias!r}). "
                "Set bias='none', or L1Penalty.scope='support'."
            )

    def begin(self, run: Run) -> None:
        """Count the model's numbers, and find the heads with their starts."""
        run.memory.numel = model_numel(run.model)
        run.memory.heads = _heads_of(run.model, run.adapter) if self.scope == "trained" else []

    def gradients(self, run: Run) -> None:
        """Pull everything that trains to its start."""
        if self.scope == "gate":
            gates = [space.gate for space in run.spaces() if space.gate.grad is not None]
            for gate in gates:
                scale = run.gradient_scale * self.weight / sum(one.numel() for one in gates)
                add_l1_gradient(gate, gate.detach(), scale)
            return
        weight = run.gradient_scale * self.weight / run.memory.numel
        for space in run.spaces():
            pull_support(space, weight)
        for parameter, start in run.memory.heads:
            add_l1_gradient(parameter, parameter.detach() - start, weight)


def pull_support(space: UnitSpace, weight: float) -> None:
    """Add the gradient of `weight` times the sum of |change| of a support's trained entries."""
    distance = space.values.detach().clone()
    distance[: space.count][~space.trained()] = 0
    # What changes the weight is the value times this: its sign is the value's, its slope the factor's size.
    add_l1_gradient(space.values, distance, abs(space.scaling) * weight)


@torch.no_grad()
def add_l1_gradient(parameter: Tensor, distance: Tensor, weight: float) -> None:
    r"""Add :math:`w\,\mathrm{sign}(p - p_0)` to the gradient of `parameter`, if it has one; 0 at the start itself.

    `distance` is :math:`p - p_0`, of the parameter's shape; `weight` :math:`\lambda / P`.
    """
    if parameter.grad is not None:
        parameter.grad.add_(distance.sign(), alpha=weight)


def model_numel(model: nn.Module) -> int:
    """`P`: numbers of the model itself, adapters aside; a packed weight counts as what it stands for."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    bases = {id(getattr(layer.get_base_layer(), "weight", None)): layer for layer in layers}
    held = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names]
    adapters = {id(p) for one in held if isinstance(one, nn.Module) for p in one.parameters()}
    numel = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in adapters or ".modules_to_save." in name:
            continue
        layer = bases.get(id(parameter))
        numel += parameter.numel() if layer is None else layer.out_features * layer.in_features
    return numel


def _heads_of(model: nn.Module, adapter: str) -> list[tuple[nn.Parameter, Tensor]]:
    """Trained numbers of an adapter's `modules_to_save`, with the base's own beside them."""
    pairs = []
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            start = dict(module.original_module.named_parameters())
            copies = module.modules_to_save[adapter].named_parameters()
            pairs += [(copy, start[name].detach()) for name, copy in copies if copy.requires_grad]
    return pairs


@register_part("nuclear_norm")
@dataclass(frozen=True)
class NuclearNorm(Rule):
    r"""A pull towards low rank on the trained entries: :math:`\lambda\,\|P \odot M\|_*` of one random matrix a step
    (SaRA; Hu et al., 2025), `P` the current weight and `M` the trained support.

    Its gradient is :math:`\lambda\,(UV^\top) \odot M`. The official code's lands on tensors that it does not train. The
    matrix is drawn from the adapter's seed and the step, the same on all ranks.
    """

    weight: PositiveFloat = 5e-4
    r""":math:`\lambda` (SaRA: 5e-4)."""
    min_side: NonNegativeInt = 64
    """Matrices whose shorter side is not above this are left out (SaRA: 64)."""
    every: PositiveInt = 1
    """Optimizer steps between two additions (SaRA: 1). Each costs a full SVD of one matrix."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support"})
    writes: ClassVar[frozenset[str]] = frozenset({"gradient"})
    needs: ClassVar[frozenset[str]] = frozenset({"entries"})

    def check(self, config: Any) -> None:
        """Refuse an adapter without a support, or of other units than entries."""
        check_entries("NuclearNorm", config)

    def begin(self, run: Run) -> None:
        """Some matrix must be large enough, and some step due."""
        spaces, eligible = run.spaces(training=False), self._eligible(run)
        if not eligible:
            raise ValueError(
                f"NuclearNorm.min_side={self.min_side} leaves no matrix: none of the adapted ones has a shorter side "
                "above it. Lower it, or leave the rule out."
            )
        if self.every > run.total_steps:
            raise ValueError(
                f"NuclearNorm.every={self.every} is more than the run's {run.total_steps} steps: the norm would "
                "never pull. Lower it, train longer, or leave the rule out."
            )
        if not run.resumed:
            report_idle(
                [space.name for space in spaces if space not in eligible],
                len(spaces),
                f"NuclearNorm.min_side={self.min_side} is not below the shorter side, so the norm never pulls",
                "Lower min_side, or leave these modules out of target_modules.",
            )

    def gradients(self, run: Run) -> None:
        """Draw a matrix and pull it to low rank."""
        update = run.step + 1
        spaces = [space for space in self._eligible(run) if space.trains] if update % self.every == 0 else []
        if spaces:
            seed = stream_seed(run.seed, "nuclear norm", update)
            drawn = int(torch.randint(len(spaces), (), generator=torch.Generator().manual_seed(seed)))
            self.add_gradient(spaces[drawn], run.gradient_scale)

    def _eligible(self, run: Run) -> list[UnitSpace]:
        return [space for space in run.spaces(training=False) if min(space.grid.rows, space.grid.cols) > self.min_side]

    @torch.no_grad()
    def add_gradient(self, space: UnitSpace, scale: float = 1.0) -> None:
        """Add `scale * weight * (U V^T)` at the trained entries of one support to its gradient, if it has one."""
        gradient = space.values.grad
        if gradient is None:
            return
        units, trained, grid = space.alive(), space.trained(), space.grid
        weights = grid.gather(space.base_weight(), units).float() + space.living_values().float()
        masked = torch.zeros(grid.rows, grid.cols, device=weights.device)
        grid.scatter_add_(masked, units[trained], weights[trained])
        direction = all_reduce_mean(grid.gather(_nuclear_gradient(masked), units))
        gradient[: units.numel()][trained] += (scale * self.weight * direction[trained]).to(gradient)


def _nuclear_gradient(matrix: Tensor) -> Tensor:
    """`U V^T` over the singular values that are not zero: the subgradient of least norm."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    alive = s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps
    return (u * alive) @ vt
