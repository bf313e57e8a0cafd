"""Bases of which B, or both, are trained as a LoRA's are, each module's its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...ops.seeded import seeded_uniform
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .bases import Bases, Site
from .names import FIXED_A, TRAINED_A, TRAINED_B


@register_part("random_a")
@dataclass(frozen=True)
class RandomA(Bases):
    r"""A fixed and Kaiming-uniform, :math:`A \sim U(\pm 1/\sqrt{in})`: it follows from the seed and the module's name,
    in memory while the adapter is, in no file. B is trained from 0 (LoRI-D; Zhang et al., 2025)."""

    trained: ClassVar[frozenset[str]] = frozenset({"B"})
    derived_names: ClassVar[tuple[str, ...]] = (FIXED_A,)
    drawn: ClassVar[bool] = True

    def specs(self, site: Site) -> list[TensorSpec]:
        """B, `[out, r]`, whose columns are the units of kind "basis"."""
        return [TensorSpec(TRAINED_B, (site.rows, site.r), space="basis", axis=1)]

    def derive(self, site: Site, device: torch.device | None) -> dict[str, Tensor]:
        """A, `[r, in]`."""
        return {FIXED_A: seeded_uniform(site.stream("A"), site.r, site.cols, device=device) * site.cols**-0.5}


@register_part("factors")
@dataclass(frozen=True)
class Factors(Bases):
    """A and B of a LoRA, both trained: A Kaiming-uniform, B from 0. What several adapters together become."""

    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def specs(self, site: Site) -> list[TensorSpec]:
        """A, `[r, in]`, and B, `[out, r]`, whose components are the units of kind "basis"."""

        def start(generator: torch.Generator | None) -> Tensor:
            return nn.init.kaiming_uniform_(torch.empty(site.r, site.cols), a=math.sqrt(5), generator=generator)

        return [
            TensorSpec(TRAINED_A, (site.r, site.cols), space="basis", start=start),
            TensorSpec(TRAINED_B, (site.rows, site.r), space="basis", axis=1),
        ]
