"""The unit space of a kernel adapter: the entries of the update that win the competition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...rules import UnitSpace


@dataclass(frozen=True)
class KernelSpace(UnitSpace):
    """Entries of one kernel update. How many win is state of the layer; which ones follows from the factors."""

    kind: ClassVar[str] = "kernel"

    @property
    def unit(self) -> str:
        """A unit is an entry."""
        return "entry"

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.layer.numel

    capacity = size

    @property
    def unit_numel(self) -> int:
        """0: entries are computed from the factors, none has trained numbers of its own."""
        return 0

    @property
    def unit_entries(self) -> int:
        """1."""
        return 1

    @property
    def count(self) -> int:
        """Entries that win; all of them where nothing competes."""
        survivors = self.layer.survivors(self.adapter)
        return self.size if survivors is None else survivors

    def alive(self) -> Tensor:
        """Flat positions of the entries that are not zero, sorted; builds the kernel once."""
        (piece,) = self.layer.pieces(self.adapter)
        return piece.entries()[0]

    def gather(self, dense: Tensor) -> Tensor:
        """`[a]`, in `dense`'s dtype."""
        return dense.reshape(-1)[self.alive()]

    def parameters(self) -> list[nn.Parameter]:
        """P, Q, and the mixed kernel's numbers: every entry depends on all of them."""
        held = (getattr(self.layer, name) for name in self.layer.adapter_layer_names)
        return [tensors[self.adapter] for tensors in held if self.adapter in tensors]

    def followers(self) -> list:
        """None: factors have no slice for a single entry."""
        return []

    def write(self, units: Tensor) -> None:
        """Let as many entries win as `units` has; which ones is the kernel's.

        Raises:
            ValueError: the adapter's matrices do not compete.
        """
        self.layer.write_survivors(self.adapter, units.numel())
