"""What rules on the spectrum of a form see of it: spaces of kind "factors" and, of a weight that trains, "whole"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...rules import ComponentSpace, UnitSpace


def _refuse_deaths(space: UnitSpace, units: Tensor) -> None:
    if units.numel() != space.size:
        raise ValueError(f"Components of '{space.name}' cannot leave: nothing records that one died.")


@dataclass(frozen=True)
class FactorsSpace(ComponentSpace):
    """Components of a form B A, of which both factors train; all of them live."""

    kind: ClassVar[str] = "factors"
    gate: ClassVar[None] = None

    @property
    def A(self) -> nn.Parameter:
        """`[r, in]`."""
        return self.layer.form_tensors(self.adapter)["A"]

    @property
    def B(self) -> nn.Parameter:
        """`[out, r]`."""
        return self.layer.form_tensors(self.adapter)["B"]

    @property
    def size(self) -> int:
        """r."""
        return self.A.shape[0]

    capacity = size

    @property
    def unit_numel(self) -> int:
        """Numbers of a component."""
        return sum(self.weight_shape)

    def alive(self) -> Tensor:
        """All components."""
        return torch.arange(self.size)

    def write(self, units: Tensor) -> None:
        """Refused, unless it is all of them.

        Raises:
            ValueError: it is not.
        """
        _refuse_deaths(self, units)

    def base_weight(self) -> Tensor:
        """The weight that the form stands for, `[out, in]`.

        Raises:
            ValueError: it was released.
        """
        return self.layer.dense_base_weight()


@dataclass(frozen=True)
class WholeSpace(FactorsSpace):
    """A weight that trains whole: A is the identity, which is not there."""

    kind: ClassVar[str] = "whole"
    A: ClassVar[None] = None

    @property
    def B(self) -> nn.Parameter:
        """`[out, in]`, the weight."""
        return self.layer.form_tensors(self.adapter)["W"]

    @property
    def size(self) -> int:
        """Columns."""
        return self.weight_shape[1]

    capacity = size

    @property
    def unit_numel(self) -> int:
        """Numbers of a column."""
        return self.weight_shape[0]
