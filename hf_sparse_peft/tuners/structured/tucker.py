r"""`Tucker`: a trained core between two trained bases."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...utils.option_types import Decay, PositiveFloat, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Additive, Call, Site, Tensors, times


@register_part("tucker")
@dataclass(frozen=True)
class Tucker(Additive):
    r""":math:`\Delta W = s\,U_{out}\,G^\top U_{in}^\top` with a core G `[r_in, r_out]`, which starts at 0, between
    :math:`U_{in}` `[in, r_in]` and :math:`U_{out}` `[out, r_out]`; all three train (FLoRA; Si et al., 2024; official
    code SJTU-DeepVisionLab/FLoRA, whose convolutions have a basis of each axis: here linears alone are adapted).

    Both bases start at Kaiming normal with :math:`a = \sqrt 3` over their columns, N(0, 1 / (2 r)). It leaves as a LoRA
    of the smaller r, exactly.
    """

    r_in: PositiveInt = 8
    """Columns of U_in, at most in."""
    r_out: PositiveInt = 8
    """Columns of U_out, at most out."""
    scale: PositiveFloat = 1.0
    """s, which no rank divides."""
    dropout: Decay = 0.0
    """Of the input, in training."""
    tensor_names: ClassVar[tuple[str, ...]] = ("core", "basis_in", "basis_out")

    def specs(self, site: Site) -> list[TensorSpec]:
        """G, U_in and U_out.

        Raises:
            ValueError: a rank is above its side.
        """
        for name, rank, side in (("r_in", self.r_in, site.cols), ("r_out", self.r_out, site.rows)):
            if rank > side:
                raise ValueError(
                    f"Tucker.{name}={rank} is above the {side} of '{site.name}' ({site.rows} x {site.cols}). Lower it."
                )

        def start(shape: tuple[int, int], generator: torch.Generator | None) -> Tensor:
            return torch.randn(shape, generator=generator) / math.sqrt(2 * shape[1])

        sides = {"basis_in": (site.cols, self.r_in), "basis_out": (site.rows, self.r_out)}
        bases = [TensorSpec(name, shape, start=partial(start, shape)) for name, shape in sides.items()]
        return [TensorSpec("core", (self.r_in, self.r_out)), *bases]

    def update(self, x: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """Over U_in, over G, over U_out."""
        x = F.dropout(x, self.dropout, call.training)
        core, basis_in, basis_out = (tensors[name].to(call.dtype) for name in self.tensor_names)
        return self.scale * times(times(times(x, basis_in.t()), core.t()), basis_out)

    def weight(self, tensors: Tensors, site: Site) -> Tensor:
        """The product."""
        B, A = self.factors(tensors, site)
        return B @ A

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """The core goes to the side that has more columns."""
        core, basis_in, basis_out = (tensors[name] for name in self.tensor_names)
        if self.r_out <= self.r_in:
            return self.scale * basis_out, core.t() @ basis_in.t()
        return self.scale * basis_out @ core.t(), basis_in.t()
