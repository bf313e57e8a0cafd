"""The unit space of a diagonal core whose components may die."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...rules import UnitSpace


@dataclass(frozen=True)
class DiagonalSpace(UnitSpace):
    """Numbers of a diagonal core: component i of the update dies with number i, and returns with it."""

    kind: ClassVar[str] = "core"
    unit: ClassVar[str] = "component"
    packed: ClassVar[bool] = False

    @property
    def gate(self) -> nn.Parameter:
        """`[r]`, the diagonal."""
        return self.layer.spectral_lora_core[self.adapter]

    @property
    def mask(self) -> Tensor:
        """uint8 `[r]`: which components live."""
        return self.layer.spectral_lora_core_mask[self.adapter]

    @property
    def size(self) -> int:
        """Components."""
        return self.gate.numel()

    capacity = size

    @property
    def unit_numel(self) -> int:
        """1: its number."""
        return 1

    def alive(self) -> Tensor:
        """Living components, sorted."""
        return self.mask.nonzero().squeeze(1)

    def parameters(self) -> list[nn.Parameter]:
        """The diagonal."""
        return [self.gate]

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """The diagonal, as a gate."""
        return {"gate": (self.gate, 0)}

    def write(self, units: Tensor) -> None:
        """Let the components `units` live; the others' numbers are 0 from now on, in place."""
        self.mask.copy_(torch.zeros_like(self.mask).index_fill_(0, units.long(), 1))
        self.apply_mask()

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Zero the numbers of components that do not live; an optimizer may have moved them."""
        self.gate.data.mul_(self.mask)
