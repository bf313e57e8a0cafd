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
    counted: ClassVar[bool] = True

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
    def initial(self) -> int:
        """Entries that `sparsity` leaves."""
        return self.size - round(self.config.sparsity * self.size)

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

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """P and Q, whose numbers belong to all entries."""
        held = {"P": self.layer.kernel_lora_P, "Q": self.layer.kernel_lora_Q}
        return {name: (tensors[self.adapter], None) for name, tensors in held.items()}

    def followers(self) -> list:
        """None: factors have no slice for a single entry."""
        return []

    def write(self, units: Tensor) -> None:
        """Let as many entries win as `units` has; which ones is the kernel's."""
        self.resize(units.numel())

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raises `ValueError` where a rule needs counts and the adapter has none."""
        if "counts" in needs and not self.config.own_counts:
            raise ValueError(
                f"The matrix of '{self.name}' has no count of its own. Name the rule in the config's schedule, or set "
                "own_counts=True."
            )

    def resize(self, count: int) -> None:
        """Let `count` entries win from now on.

        Raises:
            ValueError: the adapter's matrices have no counts of their own.
        """
        self.layer.write_survivors(self.adapter, count)
