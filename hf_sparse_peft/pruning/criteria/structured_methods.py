"""Scores of heads and channels from gradients, all blocks at once on the dense model: LoRAPrune, OBA, NViT."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ...ops import autocast_off
from ...sparsity import stream_seed
from ...utils.option_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range
from ...utils.parts import FrozenDict, register_part
from ..reading.calibration_batches import CalibrationBatches, without_weight_gradients
from ..units.structure import CHANNELS, HEADS, BlockStructure, Kind
from ..units.unit_gates import Gate, unit_gates
from ..units.unit_scores import (
    UnitScores,
    entries_of_unit,
    kept_by_block,
    kept_over_all,
    lora_gradient,
    sum_by_unit,
    weight_of,
)
from .one_shot_methods import PruningMethod


@dataclass(frozen=True)
class Scored:
    """What a method found on the dense model."""

    scores: UnitScores
    importance: dict[str, float] = field(default_factory=dict)
    """Of blocks, by name, where the method allots by it."""


class StructuredPruning(PruningMethod):
    """A way to score heads and channels of all blocks on the dense model, before anything is removed."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({HEADS, CHANNELS})
    """Which units it can score; all of them go where no pattern is given."""
    competes: ClassVar[bool] = False
    """Whether heads and channels compete with one another, so that of one of them none may go."""

    @abstractmethod
    def score(
        self,
        model: nn.Module,
        structures: list[BlockStructure],
        kinds: frozenset[Kind],
        data: CalibrationBatches,
        seed: int,
    ) -> Scored:
        """Scores of every unit of `kinds`, the highest kept first. No weight is touched."""

    def keep(
        self, model: nn.Module, structures: list[BlockStructure], found: Scored, sparsity: float
    ) -> dict[str, dict[Kind, Tensor]]:
        """Sorted units that stay, by block and kind: of each block as many."""
        return {
            block: {kind: kept_by_block(scores, sparsity) for kind, scores in kinds.items()}
            for block, kinds in found.scores.items()
        }


@register_part("lora_prune")
@dataclass(frozen=True)
class LoRAPrune(StructuredPruning):
    r"""Gradients of LoRA factors in place of the weights', in one shot on calibration data (Zhang et al., 2024;
    official code aim-uofa/LoRAPrune).

    Of every matrix :math:`I = |\hat G \odot (s B A + W)|` with :math:`\hat G = g_B A + B g_A - g_B g_A`
    (`unit_scores.lora_gradient`), summed over the entries of a unit; each matrix' vector of units is divided by its
    L2 norm, and all matrices of attention, or of the feed-forward part, are added. Scores of batches are averaged,
    :math:`\bar I \leftarrow \lambda \bar I + (1 - \lambda) I`, from 0 as released. No weight asks for its gradient.

    Factors start as LoRA's do, `A` uniform (Kaiming, a = sqrt 5) and `B = 0`, and stay there: the paper's run trains
    them between batches, and prunes while it does. With B = 0, :math:`\hat G = g_B A`. The paper squares; its code
    takes the absolute value, as here.
    """

    r: PositiveInt = 8
    """Rank of the factors."""
    alpha: PositiveFloat = 16.0
    """LoRA's alpha; s = alpha / r."""
    decay: Annotated[float, Range(least=0, below=1)] = 0.9
    """lambda of the average over batches."""
    first: Fraction = 0.1
    """Fraction of the blocks at the front that keep all, rounded down."""
    last: NonNegativeInt = 1
    """Blocks at the end that keep all."""

    def score(
        self,
        model: nn.Module,
        structures: list[BlockStructure],
        kinds: frozenset[Kind],
        data: CalibrationBatches,
        seed: int,
    ) -> Scored:
        """See the class."""
        begin, end = int(self.first * len(structures)), len(structures) - self.last
        if begin >= end:
            raise ValueError(
                f"LoRAPrune(first={self.first}, last={self.last}) leaves none of {len(structures)} blocks to prune: "
                "lower them."
            )
        pruned = structures[begin:end]
        layers = list(dict.fromkeys(m.module for s in pruned for kind in sorted(kinds) for m in s.members(kind)))
        average: UnitScores = {s.name: {kind: torch.zeros(s.units(kind)) for kind in sorted(kinds)} for s in pruned}
        scaling = self.alpha / self.r
        with without_weight_gradients(model), _lora_factors(model, layers, self.r, scaling, seed) as factors:
            leaves = [leaf for pair in factors.values() for leaf in pair]
            for loss in data.losses(model):
                read = torch.autograd.grad(loss, leaves)
                pairs = dict(zip(factors, zip(read[::2], read[1::2], strict=True), strict=True))
                with torch.no_grad(), autocast_off(loss.device.type):
                    for structure in pruned:
                        for kind, score in average[structure.name].items():
                            new = self._of_block(model, structure, kind, factors, pairs)
                            score.mul_(self.decay).add_(new, alpha=1 - self.decay)
        return Scored(average)

    def _of_block(
        self, model: nn.Module, structure: BlockStructure, kind: Kind, factors: dict[str, Any], read: dict[str, Any]
    ) -> Tensor:
        total = torch.zeros(structure.units(kind))
        for member in structure.members(kind):
            a, b = factors[member.module]
            merged = weight_of(model, member.module).float() + self.alpha / self.r * (b @ a)
            scores = (lora_gradient(a, b, *read[member.module]) * merged).abs()
            units = sum_by_unit(scores, member, structure.units(kind))
            total += (units / units.norm().clamp(min=torch.finfo(units.dtype).tiny)).cpu()
        return total


@contextmanager
def _lora_factors(
    model: nn.Module, layers: list[str], r: int, scaling: float, seed: int
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside, layers have factors A `[r, in]` and B `[out, r]` beside them, fp32."""
    factors, hooks = {}, []
    try:
        for name in layers:
            weight = weight_of(model, name)
            generator = torch.Generator().manual_seed(stream_seed(seed, name))
            a = (torch.rand(r, weight.shape[1], generator=generator) * 2 - 1) * weight.shape[1] ** -0.5
            b = torch.zeros(weight.shape[0], r, device=weight.device, requires_grad=True)
            factors[name] = (a.to(weight.device).requires_grad_(), b)
            hooks.append(model.get_submodule(name).register_forward_hook(_beside(*factors[name], scaling)))
        yield factors
    finally:
        for hook in hooks:
            hook.remove()


def _beside(a: Tensor, b: Tensor, scaling: float) -> Any:
    def hook(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + (args[0].to(a.dtype) @ a.t() @ b.t() * scaling).to(output.dtype)

    return hook


@register_part("hessian_saliency")
@dataclass(frozen=True)
class HessianSaliency(StructuredPruning):
    r"""Square of a unit's first-order Taylor term, :math:`I_S = (\sum_{i \in S} g_i w_i)^2`, averaged over batches, in
    one ranking over all blocks and kinds (NViT's Hessian-aware saliency; Yang et al., 2023; official code NVlabs/NViT).

    The square of the sum, not the sum of squares: it is the squared derivative by a gate on the unit, biases that go
    with it included, so that no weight's gradient is made. With `latency`, :math:`I_S \leftarrow I_S - \eta \Delta_S`.
    Units that score lowest go until `sparsity` of all their entries are gone; the best of each kind in each block
    stays. Scores that are not finite are refused (released: 0, so that they go first).

    The paper prunes a step at a time between updates, in chunks of units, and removes embedding and query-key widths
    too; here units are heads and channels and go at once. A chunk is a unit.
    """

    latency: dict[str, NonNegativeFloat] = field(default_factory=FrozenDict)
    """What a unit less saves, by kind: `{"heads": 0.8, "channels": 0.01}`, in any unit; empty: nothing counts."""
    eta: NonNegativeFloat = 5e-4
    """Importance that a unit of time is worth."""

    competes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.latency) - {HEADS, CHANNELS}:
            raise ValueError(f"HessianSaliency.latency={dict(self.latency)!r} takes 'heads' and 'channels'.")

    def score(
        self,
        model: nn.Module,
        structures: list[BlockStructure],
        kinds: frozenset[Kind],
        data: CalibrationBatches,
        seed: int,
    ) -> Scored:
        """See the class."""
        found = _zeros(structures, kinds)
        with without_weight_gradients(model), unit_gates(model, structures, kinds, biases=True) as gates:
            for loss in data.losses(model):
                read = torch.autograd.grad(loss, [gate.value for gate in gates])
                for block, of_kinds in sum_over_members(gates, read).items():
                    for kind, sums in of_kinds.items():
                        found[block][kind] += sums.square() / len(data.inputs)
        for of_kinds in found.values():
            for kind, scores in of_kinds.items():
                scores -= self.eta * self.latency.get(kind, 0.0)
        return Scored(found)

    def keep(
        self, model: nn.Module, structures: list[BlockStructure], found: Scored, sparsity: float
    ) -> dict[str, dict[Kind, Tensor]]:
        """All units compete (`unit_scores.kept_over_all`)."""
        known = {structure.name: structure for structure in structures}
        costs = {
            block: {kind: entries_of_unit(model, known[block], kind) for kind in kinds}
            for block, kinds in found.scores.items()
        }
        return kept_over_all(found.scores, costs, sparsity)


def _zeros(structures: list[BlockStructure], kinds: frozenset[Kind]) -> UnitScores:
    return {s.name: {kind: torch.zeros(s.units(kind)) for kind in sorted(kinds)} for s in structures}


def sum_over_members(gates: list[Gate], values: Any) -> UnitScores:
    """Sums over the members of each unit."""
    found: UnitScores = {}
    for gate, value in zip(gates, values, strict=True):
        of_kinds = found.setdefault(gate.block, {})
        value = value.detach().float().cpu()
        of_kinds[gate.kind] = of_kinds[gate.kind] + value if gate.kind in of_kinds else value
    return found
