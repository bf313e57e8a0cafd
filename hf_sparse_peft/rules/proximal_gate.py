"""`ProximalGate`: a threshold on the gate after every update; components whose gate is 0 die (SoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..sparsity import dead_zone_threshold, soft_threshold
from ..utils.option_types import PositiveFloat
from ..utils.parts import register_part
from .rule import RankRule
from .run import Run


@register_part("proximal_gate")
@dataclass(frozen=True)
class ProximalGate(RankRule):
    r"""Soft threshold :math:`g \leftarrow \mathrm{sign}(g)\max(|g| - \xi, 0)` on the gate after every optimizer step
    (SoRA; Ding et al., 2023), with :math:`\xi = \eta\lambda` and the gate's own learning rate :math:`\eta`.

    Components whose gate is 0 do not live, and return where a step takes their gate beyond the threshold. A layer
    without any gradient, and a step that fp16's scaler skips, change nothing.
    """

    weight: PositiveFloat = 1e-2
    r""":math:`\lambda`; the threshold itself with `scaled_by_lr=False` (released code: 3e-4)."""
    scaled_by_lr: bool = True
    """Whether the threshold is the weight times the gate's learning rate, as published."""
    kind: Literal["soft", "dead_zone"] = "soft"
    r"""`dead_zone` is the released code's, which zeroes what is in :math:`(\xi, 2\xi)` too."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank", "core"})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "values"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate"})
    undecayed: ClassVar[frozenset[str]] = frozenset({"gate"})
    gate: ClassVar[str] = "normal"

    def after_update(self, run: Run) -> None:
        """Threshold the gates, and let those live that are left."""
        shrink = soft_threshold if self.kind == "soft" else dead_zone_threshold
        for space in [] if run.step_skipped else run.spaces():
            if any(parameter.grad is not None and parameter.grad.any() for parameter in space.parameters()):
                size = self.weight * (run.lr(space.gate) if self.scaled_by_lr else 1.0)
                space.gate.data.copy_(shrink(space.gate.data, size))
                space.write(space.gate.nonzero().squeeze(1))
        run.record_change(alive=sum(space.count for space in run.spaces(training=False)))
