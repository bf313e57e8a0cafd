"""Optimal Brain Apoptosis: heads and channels by the Hessian of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...sparsity import stream_seed
from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ..reading.calibration_batches import CalibrationBatches, without_weight_gradients
from ..reading.one_shot import prunable_layers
from ..units.structure import BlockStructure, Kind
from ..units.unit_gates import Gate, unit_gates
from ..units.unit_scores import UnitScores
from .structured_methods import Scored, StructuredPruning, sum_over_members


@register_part("oba")
@dataclass(frozen=True)
class OBA(StructuredPruning):
    r"""Optimal Brain Apoptosis: units by the quadratic form of the loss' Hessian (Sun et al., 2025; official code
    NEU-REAL/OBA).

    `fast`, the released fastOBA: :math:`h = \theta \odot (H \theta)` with the weights of all linear layers of the trunk
    as :math:`\theta`, one double backward a batch, averaged over batches and summed over a unit's entries of each
    matrix; :math:`|h|` of its matrices are added, or (`over_members="sum"`) the absolute value of their sum is taken;
    both are divided by the largest of their group (kind and block). No first-order term, no 1/2, no biases; what a unit
    shares with other units counts, so that it is no change of the loss.

    `group`, the second-order change of the loss when S alone goes:
    :math:`I_S = |\sum_{i \in S} (-g_i \theta_i + \frac12 \theta_i (H \theta_S)_i)|`, :math:`\theta_S` being 0 outside
    of S, biases that go with it included. Exact with `probes=None`: a double backward a unit and batch. Else the
    quadratic terms are estimated by so many random signs (Hutchinson).

    Second derivatives need plain attention: PyTorch's fused kernels are switched off meanwhile. Activations of a whole
    pass stay alive.
    """

    curvature: Literal["fast", "group"] = "fast"
    """Which of the two."""
    over_members: Literal["absolute", "sum"] = "absolute"
    """`fast` only: how the matrices of a unit are joined."""
    probes: PositiveInt | None = None
    """`group` only: random signs a batch; None: exactly."""

    def score(
        self,
        model: nn.Module,
        structures: list[BlockStructure],
        kinds: frozenset[Kind],
        data: CalibrationBatches,
        seed: int,
    ) -> Scored:
        """See the class."""
        fast = self.curvature == "fast"
        others = [layer.name for layer in prunable_layers(model)] if fast else []
        with (
            without_weight_gradients(model),
            sdpa_kernel(SDPBackend.MATH),
            unit_gates(model, structures, kinds, others, biases=not fast) as gates,
        ):
            values = [gate.value for gate in gates]
            total = [torch.zeros_like(value, requires_grad=False) for value in values]
            for number, loss in enumerate(data.losses(model)):
                first = torch.autograd.grad(loss, values, create_graph=True)
                terms = _hessian_row_sums(first, values) if fast else self._changes(first, gates, number, seed)
                for sums, term in zip(total, terms, strict=True):
                    sums += term / len(data.inputs)
        mine = [(gate, sums) for gate, sums in zip(gates, total, strict=True) if gate.kind in kinds]
        if not fast:
            return Scored(_absolute(sum_over_members([g for g, _ in mine], [s for _, s in mine])))
        if self.over_members == "absolute":
            mine = [(gate, sums.abs()) for gate, sums in mine]
        found = _absolute(sum_over_members([g for g, _ in mine], [s for _, s in mine]))
        for of_kinds in found.values():
            for scores in of_kinds.values():
                scores /= scores.max().clamp(min=torch.finfo(scores.dtype).tiny)
        return Scored(found)

    def _changes(self, first: tuple[Tensor, ...], gates: list[Gate], number: int, seed: int) -> list[Tensor]:
        """Each member's part of the change when its unit goes."""
        values, of_unit = [gate.value for gate in gates], {}
        for at, gate in enumerate(gates):
            of_unit.setdefault((gate.block, gate.kind), []).append(at)
        quadratic = [torch.zeros_like(value, requires_grad=False) for value in values]
        if self.probes is None:
            for members in of_unit.values():
                for unit in range(len(values[members[0]])):
                    rows = torch.autograd.grad(
                        sum(first[at][unit] for at in members), [values[at] for at in members],
                        retain_graph=True, allow_unused=True,
                    )  # fmt: skip
                    for at, row in zip(members, rows, strict=True):
                        if row is not None:
                            quadratic[at][unit] = row[unit]
        else:
            generator = torch.Generator().manual_seed(stream_seed(seed, f"probes {number}"))
            for _ in range(self.probes):
                signs = {
                    key: (torch.rand(len(values[members[0]]), generator=generator) < 0.5).float() * 2 - 1
                    for key, members in of_unit.items()
                }
                drawn = [signs[gate.block, gate.kind].to(gate.value.device) for gate in gates]
                rows = _hessian_product(first, values, drawn)
                for at, row in enumerate(rows):
                    quadratic[at] += drawn[at] * row / self.probes
        return [-slope.detach() + square / 2 for slope, square in zip(first, quadratic, strict=True)]


def _hessian_row_sums(first: tuple[Tensor, ...], values: list[Tensor]) -> list[Tensor]:
    return _hessian_product(first, values, [torch.ones_like(value, requires_grad=False) for value in values])


def _hessian_product(first: tuple[Tensor, ...], values: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    # Without a path a second derivative is 0: a model whose loss is linear in all gates has no graph at all.
    if not any(slope.requires_grad for slope in first):
        return [torch.zeros_like(value, requires_grad=False) for value in values]
    dot = sum((slope * part).sum() for slope, part in zip(first, vector, strict=True))
    rows = torch.autograd.grad(dot, values, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(v, requires_grad=False) if row is None else row for row, v in zip(rows, values, strict=True)
    ]


def _absolute(scores: UnitScores) -> UnitScores:
    return {block: {kind: value.abs() for kind, value in kinds.items()} for block, kinds in scores.items()}
