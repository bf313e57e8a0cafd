"""CFSP: intermediate channels by activations, of each block as many as its importance allows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ...utils.option_types import NonNegativeFloat, PositiveInt
from ...utils.parts import register_part
from ..reading.calibration_batches import CalibrationBatches
from ..reading.input_statistics import SQUARES, InputStatistics
from ..units.structure import CHANNELS, BlockStructure, Kind
from ..units.unit_scores import weight_of
from .block_influence import block_cosines
from .structured_methods import Scored, StructuredPruning

# The released sigmoid divides sums over 128 sequences of 2,048 tokens by 10,000.
_TOKENS, _SCALE = 128 * 2048, 1e4


@register_part("cfsp")
@dataclass(frozen=True)
class CFSP(StructuredPruning):
    r"""Coarse to fine by activation (Wang et al., 2025; official code wyxscir/CFSP): intermediate channels only, all
    decided on the dense model.

    *Coarse.* Importance of a block :math:`I_l = E_t[\arccos \cos(x_{l,t}, x_{l+1,t}) / \pi]`, cosines clamped to
    [-1, 1]. With :math:`q_l = \sigma(a\,(I_l - \bar I) \cdot 128 \cdot 2048 / 10^4)`, the fraction of channels that a
    block keeps is :math:`\kappa_l = (1 - p)\, q_l / \bar q`; where the largest would pass 1, all deviations from the
    mean shrink until it is :math:`1 - p + p / 1.05`. The mean stays 1 - p.

    *Fine.* With :math:`c_j` the norm of down's input j (Wanda's), and :math:`D = |W_{down}| c^b`, channel j scores
    :math:`c_j^c` times the mean over rows h of the terms
    :math:`D_{hj} / \sum_k D_{hk} + |W_{up,jh}| / \sum_k |W_{up,kh}| + |W_{gate,jh}| / \sum_k |W_{gate,kh}|`: each
    weight's share among the channels of its row. Blocks without a gate have two terms.

    `as_released` follows the code where it differs: terms are divided by their sum over the rows h, so that each is
    1/H on average and channels rank by :math:`c_j^c` alone; importances are sums over tokens, so that the
    allotment flattens with less data than 128 x 2048 tokens; and one channel more stays (`int(kappa width) + 1`, at
    most all), unless `multiple_of` is set.
    """

    sharpness: NonNegativeFloat = 1.0
    """a: how much importances set blocks apart; 0: all the same."""
    down_power: NonNegativeFloat = 1.0
    """b: power of the activation norm inside of the down projection's term."""
    power: NonNegativeFloat = 1.0
    """c: power of the activation norm that multiplies the sum."""
    multiple_of: PositiveInt = 1
    """Channels that stay are the nearest multiple of it (the released `cuda_friendly`: 128)."""
    as_released: bool = False
    """Whether to rank and allot as the released code does."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({CHANNELS})

    def score(
        self,
        model: nn.Module,
        structures: list[BlockStructure],
        kinds: frozenset[Kind],
        data: CalibrationBatches,
        seed: int,
    ) -> Scored:
        """See the class."""
        norms = {s.name: InputStatistics(s.width, {SQUARES}, weight_of(model, s.down).device) for s in structures}
        current: dict[str, Tensor | None] = {"mask": None}
        hooks = [
            model.get_submodule(s.down).register_forward_pre_hook(
                lambda _, args, add=norms[s.name].add: add(args[0], current["mask"])
            )
            for s in structures
        ]
        try:
            with torch.no_grad():
                cosines = block_cosines(model, [s.name for s in structures], data, current=current)
        finally:
            for hook in hooks:
                hook.remove()
        per_token = {
            name: one.angle / (1 if self.as_released else one.tokens / _TOKENS) for name, one in cosines.items()
        }
        scores = {}
        for structure in structures:
            norm = norms[structure.name].mean_square().sqrt()
            with torch.no_grad():
                scores[structure.name] = {CHANNELS: self._fine(model, structure, norm).float().cpu()}
        return Scored(scores, per_token)

    def _fine(self, model: nn.Module, structure: BlockStructure, norm: Tensor) -> Tensor:
        """Scores of one block's channels, `[width]`."""
        total = torch.zeros_like(norm)
        for member in structure.members(CHANNELS):
            weight = weight_of(model, member.module).float().abs()
            if member.axis:
                weight = weight * norm**self.down_power
            else:  # rows of up and gate are channels: [hidden, width], as down is
                weight = weight[member.start : member.start + structure.width].t()
            total += relative(weight, over=0 if self.as_released else 1).mean(0)
        return total * norm**self.power

    def keep(
        self, model: nn.Module, structures: list[BlockStructure], found: Scored, sparsity: float
    ) -> dict[str, dict[Kind, Tensor]]:
        """Of each block the channels that score highest, as many as its importance allots."""
        ratios = allotted(found.importance, sparsity, self.sharpness)
        kept = {}
        for block, kinds in found.scores.items():
            width = len(kinds[CHANNELS])
            count = self._count(ratios[block], width)
            order = kinds[CHANNELS].argsort(descending=True, stable=True)[:count]
            kept[block] = {CHANNELS: order.sort().values}
        return kept

    def _count(self, ratio: float, width: int) -> int:
        exact = ratio * width + 1e-9  # 0.29 * 100 is 28.99...
        if self.as_released and self.multiple_of == 1:
            count = int(exact) + 1
        else:
            count = int((exact + self.multiple_of / 2) / self.multiple_of) * self.multiple_of
        if count < 1:
            raise ValueError(
                f"CFSP.multiple_of={self.multiple_of} leaves a block of {width} channels none of {ratio:.3g} of them: "
                "lower it, or the sparsity."
            )
        return min(count, width)


def relative(weight: Tensor, over: int) -> Tensor:
    """`weight` `[hidden, width]` divided by its sums over dimension `over`; what is 0 throughout stays 0."""
    sums = weight.sum(over, keepdim=True)
    return weight / sums.clamp(min=torch.finfo(sums.dtype).tiny)


def allotted(importance: Mapping[str, float], sparsity: float, sharpness: float = 1.0) -> dict[str, float]:
    r"""Fraction of its channels that each block keeps, :math:`\kappa_l = (1 - p)\, q_l / \bar q` (see `CFSP`), float64;
    the mean is `1 - sparsity`.

    Args:
        importance: of each block, as sums over 128 x 2048 tokens.
        sparsity: p.
        sharpness: a.
    """
    mean = math.fsum(importance.values()) / len(importance)
    q = {name: 1 / (1 + math.exp(-_bounded(sharpness * (one - mean) / _SCALE))) for name, one in importance.items()}
    average, largest = math.fsum(q.values()) / len(q), max(q.values())
    if (1 - sparsity) * largest > average and largest > average:
        shrink = average * (1 / (1 - sparsity) - 1) / (largest - average) / 1.05
        q = {name: average + (one - average) * shrink for name, one in q.items()}
    return {name: (1 - sparsity) * one / average for name, one in q.items()}


def _bounded(x: float) -> float:
    return max(min(x, 700.0), -700.0)  # exp overflows beyond


def importance_lora_config(
    importance: Mapping[str, float],
    r: int = 8,
    lora_alpha: float = 16,
    *,
    target_modules: Any = "all-linear",
    **options: Any,
) -> LoraConfig:
    r"""peft's LoRA for the recovery of a pruned model, whose ranks are proportional to the importance of blocks (CFSP):
    :math:`r_l = r\,n\,I_l / \sum I`, at least 1, `r n` in all; alpha / r is the same everywhere.

        report = prune_model(model, dataloader, method="cfsp", sparsity=0.5)
        model = get_peft_model(model, importance_lora_config(report.importance, task_type="CAUSAL_LM"))

    Args:
        importance: of each block by its name (`PruningReport.importance`, or `block_influence`).
        r: mean rank.
        lora_alpha: alpha of a block of rank `r`.
        target_modules, options: of `LoraConfig`.

    Raises:
        ValueError: no importance, a negative one, or one that is not finite; r below 1.
    """
    values = list(importance.values())
    if not values or not all(math.isfinite(one) and one >= 0 for one in values) or not any(values):
        raise ValueError(f"importance={dict(importance)!r} must hold a number >= 0 for each block, and not only zeros.")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r={r!r} must be a whole number >= 1: the mean rank of the blocks.")
    ranks = _ranks(importance, r * len(values))
    pattern = {rf"{re.escape(name)}\..*": rank for name, rank in ranks.items()}
    alphas = {key: lora_alpha * rank / r for key, rank in pattern.items()}
    return LoraConfig(
        r=r, lora_alpha=lora_alpha, rank_pattern=pattern, alpha_pattern=alphas, target_modules=target_modules, **options
    )


def _ranks(importance: Mapping[str, float], total: int) -> dict[str, int]:
    """`total` in proportion, 1 at least each; what rounding leaves goes to the largest remainders, of equals the
    earlier."""
    names, free = list(importance), total - len(importance)
    whole = math.fsum(importance.values())
    exact = {name: max(total * importance[name] / whole - 1, 0.0) for name in names}
    scale = free / max(math.fsum(exact.values()), 1e-300)
    exact = {name: one * scale for name, one in exact.items()}
    ranks = {name: int(one + 1e-9) for name, one in exact.items()}
    for name in sorted(names, key=lambda name: ranks[name] - exact[name])[: free - sum(ranks.values())]:
        ranks[name] += 1
    return {name: rank + 1 for name, rank in ranks.items()}
