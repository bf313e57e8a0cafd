r"""`ScaleShift`: a trained scale and shift of each output of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...utils.option_types import NonNegativeFloat
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Mapped, Site, Tensors

# Every Trainer keeps weight decay, which would pull outputs to 0, off parameters with `layernorm` in their names.
SCALE, SHIFT = "layernorm_scale", "layernorm_shift"


@register_part("scale_shift")
@dataclass(frozen=True)
class ScaleShift(Mapped):
    r""":math:`y' = \gamma \odot (W x + b) + \beta` (SSF; Lian et al., 2022), with
    :math:`\gamma \sim N(1, \sigma^2)` and :math:`\beta \sim N(0, \sigma^2)`: no identity at the start, as published.

    Merged, :math:`W' = \mathrm{diag}(\gamma) W` and :math:`b' = \gamma \odot b + \beta`: a layer without a bias gets
    one.
    """

    std: NonNegativeFloat = 0.02
    r""":math:`\sigma`; 0: the adapter starts as the identity."""
    shift_outputs: bool = True
    r"""Whether there is a :math:`\beta`."""
    tensor_names: ClassVar[tuple[str, ...]] = (SCALE, SHIFT)
    maps_output: ClassVar[bool] = True
    maps_bias: ClassVar[bool] = True
    shifts_bias: ClassVar[bool] = True

    def specs(self, site: Site) -> list[TensorSpec]:
        """`[rows]` each."""

        def start(mean: float):
            return lambda generator: mean + self.std * torch.randn(site.rows, generator=generator)

        scale = TensorSpec(SCALE, (site.rows,), start=start(1.0))
        return [scale, TensorSpec(SHIFT, (site.rows,), start=start(0.0))] if self.shift_outputs else [scale]

    def map_output(self, y: Tensor, tensors: Tensors, site: Site) -> Tensor:
        r""":math:`\gamma \odot y`."""
        return y * tensors[SCALE].to(y.dtype)

    def shift(self, tensors: Tensors, site: Site) -> Tensor | None:
        r""":math:`\beta`."""
        return tensors.get(SHIFT)
