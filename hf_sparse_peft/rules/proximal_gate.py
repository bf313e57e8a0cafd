"""`ProximalGate`: a threshold on the gate after every update; components whose gate is 0 die (SoRA)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..utils.parts import register_part, require
from .rule import Rule
from .run import Run


@register_part("proximal_gate")
@dataclass(frozen=True)
class ProximalGate(Rule):
    r"""Soft threshold :math:`g \leftarrow \mathrm{sign}(g)\max(|g| - \xi, 0)` on the gate after every optimizer step
    (SoRA; Ding et al., 2023), with :math:`\xi = \eta\lambda` and the gate's own learning rate :math:`\eta`.

    Components whose gate is 0 do not live, and return where a step takes their gate beyond the threshold. A layer
    without any gradient, and a step that fp16's scaler skips, change nothing. Gates are to have no weight decay.
    """

    weight: float = 1e-2
    r""":math:`\lambda`; the threshold itself with `scaled_by_lr=False` (released code: 3e-4)."""
    scaled_by_lr: bool = True
    """Whether the threshold is the weight times the gate's learning rate, as published."""
    kind: Literal["soft", "dead_zone"] = "soft"
    r"""`dead_zone` is the released code's, which zeroes what is in :math:`(\xi, 2\xi)` too."""
    l1: float = 0.0
    """Weight of the mean |g| of all gates, whose gradient is added once a step, after clipping (released code: 10)."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank", "core"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values", "gradient"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    gate: ClassVar[str] = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.weight > 0, self, "weight", "a number > 0")
        require(self.kind in ("soft", "dead_zone"), self, "kind", "'soft' or 'dead_zone'")
        require(self.l1 >= 0, self, "l1", "a number >= 0")

    def begin(self, run: Run) -> None:
        """Say that weight decay pulls the gates as well."""
        if any(run.group(space.gate).get("weight_decay") for space in run.spaces()):
            warnings.warn("ProximalGate: weight decay shrinks the gates too. Set weight_decay=0.", stacklevel=2)

    @torch.no_grad()
    def gradients(self, run: Run) -> None:
        """Add the pull of the mean |g|."""
        gates = [space.gate for space in run.spaces() if self.l1 and space.gate.grad is not None]
        for gate in gates:
            gate.grad.add_(gate.sign(), alpha=run.gradient_scale * self.l1 / sum(one.numel() for one in gates))

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Threshold the gates, and let those live that are left."""
        for space in [] if run.step_skipped else run.spaces():
            if any(parameter.grad is not None and parameter.grad.any() for parameter in space.parameters()):
                size = self.weight * (run.lr(space.gate) if self.scaled_by_lr else 1.0)
                space.gate.data.copy_(threshold(space.gate.data, size, self.kind))
                space.write(space.gate.nonzero().squeeze(1))

    def after_step(self, run: Run) -> None:
        """Note how many components live."""
        run.record_change(alive=sum(space.count for space in run.spaces(training=False)))


def threshold(gate: Tensor, size: float, kind: str = "soft") -> Tensor:
    """`gate` `[r]` shrunk by `size`; the released code's dead zone keeps what is exactly `size` in magnitude."""
    shrunk = gate.sign() * (gate.abs() - size).clamp_min(0)
    if kind == "soft":
        return shrunk
    shrunk = torch.where(gate.abs() > size, shrunk, gate)
    return torch.where(shrunk.abs() < size, torch.zeros_like(gate), shrunk)
