"""Progressive gradient flow: how N:M sparsity sets in while weights train, by decaying weights or by stages."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..utils.option_types import NonNegativeFloat
from ..utils.parts import Part, register_part


@dataclass(frozen=True)
class GradientFlow(Part):
    """Base of the ways in which N:M sparsity sets in between a dense phase and the final one, whose mask is binary."""

    part_kind: ClassVar[str] = "gradient_flow"

    def patterns(self, keep: int, of: int) -> list[tuple[int, int]]:
        """The N:M of each stage in turn, for a target of `keep` of `of`; stages are equally long.

        Raises:
            ValueError: the target has no such stages.
        """
        return [(keep, of)]

    def removed_weight(self, steps: int, length: int) -> float:
        r""":math:`\beta`: what weights off the mask are multiplied by, `steps` after the dense phase, of `length` steps
        up to the final one."""
        return 0.0

    def stage(self, steps: int, length: int, keep: int, of: int) -> tuple[int, int]:
        """The N:M that holds `steps` after the dense phase, of `length` steps up to the final one: stage i of n begins
        at `int(i * length / n)`."""
        found = self.patterns(keep, of)
        starts = [int(number * length / len(found)) for number in range(len(found))]
        return found[bisect_right(starts, steps) - 1]


@register_part("mask_decay")
@dataclass(frozen=True)
class MaskDecay(GradientFlow):
    r"""MdGF: :math:`V \odot (M + (1 - M)\,\beta_t)` with :math:`\beta_t = \max(1 - c t, 0)` or :math:`e^{-c t}`, `t` in
    steps since the dense phase (Progressive Gradient Flow; Bambhaniya et al., 2024)."""

    decay: Literal["exponential", "linear"] = "exponential"
    r"""How :math:`\beta` falls."""
    rate: NonNegativeFloat | None = None
    r"""c, per step (example config of the official code, 350 epochs: 1e-4); None: as the run is long, so that
    :math:`\beta` is 0.001, or 0 on a line, where the final phase begins."""

    def removed_weight(self, steps: int, length: int) -> float:
        r""":math:`\beta_t`."""
        exponential = self.decay == "exponential"
        rate = (math.log(1000) if exponential else 1.0) / max(length, 1) if self.rate is None else self.rate
        return math.exp(-rate * steps) if exponential else max(1 - rate * steps, 0.0)


@register_part("structure_decay")
@dataclass(frozen=True)
class StructureDecay(GradientFlow):
    """SdGF: ever sparser patterns up to N:M (Progressive Gradient Flow; Bambhaniya et al., 2024). `stepwise`: M-1:M,
    M/2:M, M/4:M, ..., N:M. `geometric`: 8N:8M, 4N:4M, 2N:2M, N:M. `densify`, of the official code: N:8M, N:4M, N:2M,
    N:M."""

    stages: Literal["stepwise", "geometric", "densify"] = "stepwise"
    """Which patterns."""

    def patterns(self, keep: int, of: int) -> list[tuple[int, int]]:
        """See the class."""
        if self.stages != "stepwise":
            return [(keep * (times if self.stages == "geometric" else 1), of * times) for times in (8, 4, 2, 1)]
        halvings = int(math.log2(of / keep))
        if halvings < 1 or of != keep * 2**halvings:
            raise ValueError(
                f"StructureDecay(stages='stepwise') halves what is kept of {of} until it is {keep}: of/keep must be a "
                "power of 2. Take stages='geometric', or another N:M."
            )
        return [(of - 1, of), *((of // 2**number, of) for number in range(1, halvings + 1))]
