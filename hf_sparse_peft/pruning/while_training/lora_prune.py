"""LoRAPrune: heads and channels leave while a LoRA trains, by a gradient that the LoRA itself estimates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ...rules import ComponentSpace, Rule, Run
from ...sparsity import Cubic, Window
from ...training import RuleRunner
from ...tuners.shared.base_weight import dense_weight
from ...tuners.shared.quantised import backend_of
from ...tuners.upstream import configs_of
from ...utils.option_types import NonNegativeInt, PositiveInt, Range
from ...utils.parts import register_part
from ..units.structure import CHANNELS, HEADS, Member
from ..units.unit_masks import MaskedUnits, mask_units, masked_spaces, unit_masks_of
from ..units.unit_scores import kept_by_block, lora_gradient, sum_by_unit
from .tensor_text import as_text, from_text

Fraction = Annotated[float, Range(least=0, below=1)]


@register_part("lora_prune")
@dataclass(frozen=True)
class PruneUnits(Rule):
    r"""Mask heads and channels, along a cubic curve, by LoRAPrune's score (Zhang et al., 2024). Run it by
    `LoRAPruneCallback`; it acts on the base's units, which no adapter has.

    With the gradients of the factors at a step, clipped, averaged over micro-batches and ranks and unscaled,

    .. math:: \hat G = g_B A + B g_A - g_B g_A, \quad I_u = \sum_{ij \in u} |\hat G_{ij} (W + s B A)_{ij}|

    of each weight that a unit u owns entries of and that has a LoRA; each weight's vector of :math:`I_u` is divided by
    its 2-norm, the vectors of a block's attention, or feed-forward part, are added, and averaged over steps,
    :math:`\bar I \leftarrow \beta \bar I + (1 - \beta) I` from 0. Before the optimizer's step t (from 0) where `every`
    divides t, `int(sparsity(t) * units)` units with the lowest :math:`\bar I` are masked, those that are masked first
    among them. A step in which some score is not finite leaves all averages as they are.

    Where the official code never applies its last sparsity (it prunes only below it: 5503 of 11008 channels at 50 %),
    the first step behind the window does here, whatever `every` says.
    """

    sparsity: Annotated[float, Range(above=0, below=1)] = 0.5
    """Fraction of each block's heads and channels that goes."""
    start: Fraction = 0.1
    """Fraction of the run's steps at which the first units go."""
    end: Annotated[float, Range(above=0, most=1)] = 0.9
    """And at which the last are gone."""
    every: PositiveInt = 10
    """Optimizer steps between two prunings."""
    beta: Fraction = 0.9
    """Smoothing of the score."""
    whole_first: Fraction = 0.1
    """Fraction of the blocks, from the first on, that lose nothing."""
    whole_last: NonNegativeInt = 1
    """Blocks at the end that lose nothing."""

    acts_on: ClassVar[frozenset[str]] = frozenset({HEADS, CHANNELS})
    writes: ClassVar[frozenset[str]] = frozenset({"units", "forward"})

    def __post_init__(self) -> None:
        super().__post_init__()
        Window(Cubic(0.0, self.sparsity), self.start, self.end)

    def begin(self, run: Run) -> None:
        """Find the blocks that lose units, and what a run that goes on knew of them.

        Raises:
            ValueError: no such block, or a run of one step; blocks without a LoRA.
        """
        blocks = list(dict.fromkeys(space.name for space in run.all_spaces))
        first, last = int(self.whole_first * len(blocks) + 1e-9), len(blocks) - self.whole_last
        if first >= last:
            raise ValueError(
                f"PruneUnits.whole_first={self.whole_first} and whole_last={self.whole_last} leave none of "
                f"{len(blocks)} blocks to prune. Lower them."
            )
        if run.total_steps < 2:
            raise ValueError("PruneUnits needs two steps at least: scores of the first are all 0. Train longer.")
        chosen = [space for space in run.all_spaces if space.name in blocks[first:last]]
        bare = next((space for space in chosen if not space.factors), None)
        if bare is not None:
            raise ValueError(
                f"No layer of the {bare.kind} of '{bare.name}' has a trained LoRA, so that nothing scores them. Name "
                "one of its projections in target_modules, or take its blocks out (whole_first, whole_last)."
            )
        run.memory = SimpleNamespace(spaces=chosen, scores={})
        for space in chosen:
            factors = space.layer.factors
            text, key = run.saved.get("scores", {}), _key(space)
            kept = torch.zeros_like(factors) if key not in text else from_text(text[key], factors)
            run.memory.scores[key] = kept
            if key in run.saved.get("masks", {}):
                space.restore(from_text(run.saved["masks"][key], factors).nonzero().flatten())

    def gradients(self, run: Run) -> None:
        """Score the step, and mask what is due."""
        self._score(run)
        if self._due(run):
            self._prune(run)
        spaces = run.memory.spaces
        run.saved["scores"] = {_key(space): as_text(run.memory.scores[_key(space)]) for space in spaces}
        run.saved["masks"] = {_key(space): as_text(space.layer.factors) for space in spaces}

    @torch.no_grad()
    def _score(self, run: Run) -> None:
        found = {}
        for space in run.memory.spaces:
            total = torch.zeros_like(space.layer.factors)
            for member, components in space.factors:
                total += unit_scores(member, components, space.size, run.gradient_scale)
            found[_key(space)] = total
        if all(bool(total.isfinite().all()) for total in found.values()):
            for key, total in found.items():
                run.memory.scores[key].mul_(self.beta).add_(total, alpha=1 - self.beta)

    def target(self, step: int, total_steps: int) -> float:
        """The sparsity before the optimizer's step `step` (from 0) of a run; the last one from `end` on, and in the
        run's last step."""
        if step >= self._last(total_steps):
            return self.sparsity
        return Window(Cubic(0.0, self.sparsity), self.start, self.end)(step / total_steps)

    def _last(self, total_steps: int) -> int:
        return min(math.ceil(self.end * total_steps - 1e-9), total_steps - 1)

    def _due(self, run: Run) -> bool:
        last = self._last(run.total_steps)
        return run.step == last or (run.step < last and run.step % self.every == 0)

    def _prune(self, run: Run) -> None:
        sparsity, scores = self.target(run.step, run.total_steps), run.memory.scores
        spaces = [space for space in run.memory.spaces if int(sparsity * space.size + 1e-9) > space.size - space.count]
        spaces = run.with_evidence(spaces, lambda space: bool(scores[_key(space)].any()), "no units were masked")
        left = 0
        for space in spaces:
            masked = space.layer.factors == 0
            kept, before = kept_by_block(scores[_key(space)].masked_fill(masked, -torch.inf), sparsity), space.count
            space.write(kept)
            left += before - space.count
        if left:
            alive = sum(space.count for space in run.memory.spaces)
            run.record(masked=left, sparsity=1 - alive / sum(space.size for space in run.memory.spaces))


def unit_scores(member: Member, components: ComponentSpace, units: int, scale: float = 1.0) -> Tensor:
    r""":math:`I_u / \|I\|_2` of one weight, fp32 `[units]`; zeros where its factors have no gradient.

    `scale`: what the gradients are multiplied by.
    """
    A, B = components.A.detach().float(), components.B.detach().float()
    if components.A.grad is None or components.B.grad is None:
        return torch.zeros(units, device=A.device)
    estimate = lora_gradient(A, B, components.A.grad.float() / scale, components.B.grad.float() / scale)
    sums = sum_by_unit((estimate * merged_weight(components)).abs(), member, units)
    norm = sums.norm()
    return sums / norm if norm > 0 else sums


def merged_weight(components: ComponentSpace) -> Tensor:
    """`W + s B A`, fp32 `[out, in]`, a fresh tensor."""
    layer = components.layer
    base = layer.get_base_layer()
    scaling = getattr(layer, "scaling", None) or components.scalings
    weight = dense_weight(base, backend_of(base)).float()
    return weight + scaling[components.adapter] * (components.B.detach().float() @ components.A.detach().float())


class LoRAPruneCallback(RuleRunner):
    """Runs `PruneUnits` in a `Trainer`, on the units of the base below a plain LoRA (upstream's, or a
    `SparseLoraConfig(density=0)`). Masks go onto the model when training begins, and stay when it has ended:
    `slice_model(model)` cuts what they mask, base and LoRA alike.

    A checkpoint keeps scores and masks, so that a resumed run goes on with the same bits.
    """

    def __init__(self, rule: PruneUnits | dict | None = None) -> None:
        super().__init__(PruneUnits() if rule is None else rule)

    def _make_runs(self) -> Iterator[Run]:
        model = self.training.model
        masks = unit_masks_of(model) or mask_units(model)
        spaces = masked_spaces(model, masks)
        adapter = next((space.adapter for space in spaces if space.adapter), None)
        if adapter is not None:
            self._take_charge(self.rule, configs_of(model)[adapter])
            yield Run(self.training, self.rule, adapter, None, spaces)


def _key(space: MaskedUnits) -> str:
    return f"{space.name}.{space.kind}"
