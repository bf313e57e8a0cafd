"""Trained bases that several modules share. They belong to the first of them in model order: registered, counted and
saved once, there."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...ops.seeded import seeded_permutation
from ...utils.option_types import NonNegativeInt, PositiveInt
from ...utils.parts import register_part, require
from ...utils.tensors import TensorSpec
from .bases import Bases, Site
from .names import TRAINED_A, TRAINED_B


def _type_of(name: str) -> str:
    return name.rpartition(".")[2]


@register_part("shared")
@dataclass(frozen=True)
class SharedBases(Bases):
    """Trained bases of which one or both are one tensor for several modules: those of one type, "q_proj" of every
    layer (ShareLoRA; Song et al., 2024), or all of equal sides (S2-LoRA; Liu et al., 2024)."""

    sides: Literal["A", "B", "AB"] = "A"
    """What is shared."""
    across: Literal["type", "shape"] = "type"
    """Modules whose last name and shared sides are equal, or whose sides are."""
    init: Literal["lora", "normal"] = "lora"
    """A Kaiming-uniform and B = 0, or both N(0, 0.02^2)."""
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    @property
    def shared(self) -> tuple[str, ...]:
        """The shared bases."""
        return tuple(name for side, name in (("A", TRAINED_A), ("B", TRAINED_B)) if side in self.sides)

    def group(self, site: Site) -> Hashable:
        """Type, and what the shared tensors' shapes follow from."""
        sides = (site.cols if "A" in self.sides else None, site.rows if "B" in self.sides else None)
        return (_type_of(site.name) if self.across == "type" else "", site.r, *sides)

    def specs(self, site: Site) -> list[TensorSpec]:
        """Both bases, without what belongs to another module."""

        def start(shape: tuple[int, int], _: torch.Generator | None) -> Tensor:
            if self.init == "normal":
                return torch.randn(shape) * 0.02
            return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))

        A, B = (site.r, site.cols), (site.rows, site.r)
        found = [
            TensorSpec(TRAINED_A, A, start=partial(start, A)),
            TensorSpec(TRAINED_B, B, axis=1, start=partial(start, B) if self.init == "normal" else None),
        ]
        return [spec for spec in found if site.owns or spec.name not in self.shared]


@register_part("shards")
@dataclass(frozen=True)
class Shards(Bases):
    r"""Two pools of vectors for all modules of one type, from which each module puts its bases together (MoS; Wang et
    al., 2025; official code Forence1999/MoS).

    With L modules the pools have :math:`e L l` rows of `in / l` and `out / l` numbers, as many as L LoRAs of rank e.
    Component k of a module is the concatenation of rows :math:`i_{kl}, \dots, i_{kl+l-1}`. Its :math:`r l` indices are
    :math:`(r - p) l` of the :math:`(e - p) L l` shared rows without repetition, drawn independently for A and B, then
    the :math:`p l` rows that no other module uses. They follow from the seed and the module's name. Where there are too
    few shared rows for r, it is what they allow.
    """

    e: PositiveInt = 2
    """Rank of a LoRA of as many numbers."""
    l: PositiveInt = 4  # noqa: E741 (the paper's name)
    """Shards of a vector."""
    p: NonNegativeInt = 1
    """Of the e components, those whose rows are a module's own."""
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    shared: ClassVar[tuple[str, ...]] = (TRAINED_A, TRAINED_B)
    drawn: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.p <= self.e, self, "p", f"an integer from 0 to e={self.e}")

    def group(self, site: Site) -> Hashable:
        """Type and sides."""
        return _type_of(site.name), site.rows, site.cols

    def specs(self, site: Site) -> list[TensorSpec]:
        """Both pools at their owner: A's Kaiming-uniform over the whole input, B's 0.

        Raises:
            ValueError: a side is not divisible by l.
        """
        if site.rows % self.l or site.cols % self.l:
            raise ValueError(
                f"Shards.l={self.l} does not divide both sides of '{site.name}' ({site.rows}x{site.cols}). Choose "
                "another l, or leave the module out with exclude_modules."
            )
        if not site.owns:
            return []
        rows = self.e * site.sharing.users * self.l

        def start(generator: torch.Generator | None) -> Tensor:
            bound = site.cols**-0.5
            return torch.empty(rows, site.cols // self.l).uniform_(-bound, bound, generator=generator)

        return [
            TensorSpec(TRAINED_A, (rows, site.cols // self.l), start=start),
            TensorSpec(TRAINED_B, (rows, site.rows // self.l)),
        ]

    def components(self, site: Site) -> int:
        """e where all rows are private, else r, at most as many as there are shared rows for."""
        shared = (self.e - self.p) * site.sharing.users
        return self.p + min(max(site.r - self.p, 0), shared)

    def indices(self, side: str, site: Site) -> Tensor:
        """int64 `[r l]`: rows of the pool of "A" or "B", component after component."""
        shared = (self.e - self.p) * site.sharing.users * self.l
        drawn = seeded_permutation(site.stream(side), shared)[: (site.r - self.p) * self.l]
        own = torch.arange(self.p * self.l) + shared + site.sharing.position * self.p * self.l
        return torch.cat([drawn, own])

    derived_names: ClassVar[tuple[str, ...]] = ("indices_A", "indices_B")

    def derive(self, site: Site, device: torch.device | None) -> dict[str, Tensor]:
        """Both lists of indices."""
        return {f"indices_{side}": self.indices(side, site).to(device) for side in "AB"}

    def factors(self, tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
        """The bases put together."""
        A = tensors[TRAINED_A].index_select(0, tensors["indices_A"]).view(site.r, site.cols)
        B = tensors[TRAINED_B].index_select(0, tensors["indices_B"]).view(site.r, site.rows)
        return B.t(), A
