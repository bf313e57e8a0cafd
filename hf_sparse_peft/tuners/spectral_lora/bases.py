r"""Bases: what stands on both sides of a core, :math:`\Delta W = s\,B\,C\,A` with `B` `[out, a]`, `A` `[b, in]`.

bases.py         what all bases say of themselves
ranks.py         Energy, SpectrumSpread: how many components each weight gets
found.py         SVD, GradientSVD, LDU: found in a weight or its gradient
factors.py       RandomA, Factors: B, or both, trained as a LoRA's
masked.py        MaskedB: entries of B trained, those that a first run made largest
drawn.py         RandomBases, RandomCombination: drawn from a seed, in no file
shared.py        SharedBases, Shards: trained, one for several modules
subspace.py      Fastfood: one trained point for all weights
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...sparsity import Statistic, stream_seed
from ...utils.parts import Part
from ...utils.tensors import TensorSpec
from ..shared.sharing import Sharing
from .names import FIXED_A, FIXED_B, TRAINED_A, TRAINED_B


class Site(NamedTuple):
    """The module that bases are for, and what the config says of it."""

    name: str
    rows: int
    cols: int
    r: int
    """Components."""
    lora_alpha: float | None
    """Numerator of s; None: r."""
    seed: int
    """Seed of the adapter's draws."""
    sharing: Sharing | None = None

    @property
    def scaling(self) -> float:
        """s, or what it starts at."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.r

    @property
    def owns(self) -> bool:
        """Whether what is shared belongs to this module."""
        return self.sharing is None or self.sharing.owner == self.name

    def stream(self, *purpose: str) -> int:
        """Seed of a draw for this module."""
        return stream_seed(self.seed, self.name, "spectral_lora", *purpose)


class Found(NamedTuple):
    """What bases start with where it follows from the weight, or from data."""

    A: Tensor
    B: Tensor
    values: Tensor
    """`[r]`, the spectrum, or what stands for it."""


Weights = Mapping[str, Callable[[], Tensor]]
"""Module name -> its weight `[out, in]`, fp32, made when it is called."""


@dataclass(frozen=True)
class RankChoice(Part):
    """Base of the ways to choose the components of each module."""

    part_kind: ClassVar[str] = "rank_choice"

    def ranks(self, weights: Weights, sites: Mapping[str, Site]) -> dict[str, int]:
        """Module name -> components, at least 1 and at most the smaller side; `sites` have the config's own r."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bases(Part):
    """Base of the ways to get the two bases of a module. Their tensors are among those that the layer has containers
    for (`names`)."""

    part_kind: ClassVar[str] = "bases"
    trained: ClassVar[frozenset[str]] = frozenset()
    """Sides that are trained: "A", "B"."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that the owner has for all modules of a group."""
    derived_names: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that `derive` makes."""
    drawn: ClassVar[bool] = False
    """Whether anything that files leave out is drawn from the seed."""
    recomputed = False
    """Whether bases are found in the weight anew wherever the adapter is loaded."""
    dense: ClassVar[bool] = False
    """Whether the update is no product of factors: `update` and `product` say what it is then."""

    def inner(self, site: Site) -> tuple[int, int]:
        """Columns of B and rows of A, the sides of the core."""
        return site.r, site.r

    def components(self, site: Site) -> int:
        """Components of the module, where there cannot be r of them; its sides allow `site.r`."""
        return site.r

    def group(self, site: Site) -> Hashable | None:
        """Modules of one group share tensors; None: nothing is shared."""
        return None

    @property
    def rank_choice(self) -> RankChoice | None:
        """How the components of each module follow from the weights when the adapter is injected; None: they do not."""
        return None

    def specs(self, site: Site) -> list[TensorSpec]:
        """The tensors that the module has, trained or saved; what follows from the seed is neither.

        Raises:
            ValueError: the weight has no such bases.
        """
        a, b = self.inner(site)
        A = TensorSpec(TRAINED_A, (b, site.cols), space="basis") if "A" in self.trained else None
        B = TensorSpec(TRAINED_B, (site.rows, a), space="basis", axis=1) if "B" in self.trained else None
        return [
            A or TensorSpec(FIXED_A, (b, site.cols), role="saved"),
            B or TensorSpec(FIXED_B, (site.rows, a), role="saved"),
        ]

    def planned(self, sites: Mapping[str, Site]) -> tuple[Bases, Mapping[str, Mapping[str, Tensor]]]:
        """Asked when a new adapter is injected, with all of its modules: the bases with what they decide over all of
        them, and module name -> tensors that it starts with, by name.

        Raises:
            ValueError: what they decide by does not fit these modules.
        """
        return self, {}

    def find(self, weight: Tensor, site: Site) -> Found | None:
        """The bases of `weight` `[out, in]`, fp32; None where they do not follow from it.

        Raises:
            ValueError: it has none.
        """
        return None

    @property
    def statistic(self) -> Statistic | None:
        """What the bases wait for, read from the training data; None: nothing."""
        return None

    def find_in(self, state: dict[str, Tensor] | None, weight: Tensor, site: Site) -> Found:
        """The bases by the state of `statistic`, fp32; None: the data says nothing about the layer."""
        raise NotImplementedError

    def derive(self, site: Site, device: torch.device | None) -> dict[str, Tensor]:
        """The tensors that follow from the seed and are kept in memory, by name."""
        return {}

    def derive_from(self, found: Found, fingerprint: Tensor, site: Site) -> dict[str, Tensor]:
        """`derive` for bases that are found in the weight again instead of saved (`recomputed`); `fingerprint` is that
        of those that the core belongs to.

        Raises:
            ValueError: these are others.
        """
        raise NotImplementedError

    def factors(self, tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
        """B and A; `tensors` are the module's, the shared and the derived ones, by name."""
        A = tensors[TRAINED_A if "A" in self.trained else FIXED_A]
        return tensors[TRAINED_B if "B" in self.trained else FIXED_B], A
