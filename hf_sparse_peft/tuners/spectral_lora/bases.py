r"""Bases: what stands on both sides of a core, :math:`\Delta W = s\,B\,C\,A` with `B` `[out, a]`, `A` `[b, in]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from ...sparsity.decomposition import truncated_svd
from ...utils.parts import Part, register_part
from ...utils.tensors import TensorSpec

TRAINED_A, TRAINED_B = "spectral_lora_A", "spectral_lora_B"
FIXED_A, FIXED_B = "spectral_lora_basis_A", "spectral_lora_basis_B"


class Site(NamedTuple):
    """The module that bases are for, and what the config says of it."""

    name: str
    rows: int
    cols: int
    r: int
    """Components."""
    scaling: float
    """s, or what it starts at."""
    seed: int
    """Seed of the adapter's draws."""


class Found(NamedTuple):
    """What bases start with where it follows from the weight."""

    A: Tensor
    B: Tensor
    values: Tensor
    """`[r]`, the spectrum, in falling order where it has one."""


@dataclass(frozen=True)
class Bases(Part):
    """Base of the ways to get the two bases of a module."""

    part_kind: ClassVar[str] = "bases"
    trained: ClassVar[frozenset[str]] = frozenset()
    """Sides that are trained: "A", "B"."""

    def inner(self, site: Site) -> tuple[int, int]:
        """Columns of B and rows of A, the sides of the core."""
        return site.r, site.r

    def specs(self, site: Site) -> list[TensorSpec]:
        """The tensors of both bases, trained or saved; what follows from the seed alone is neither."""
        a, b = self.inner(site)
        A = TensorSpec(TRAINED_A, (b, site.cols)) if "A" in self.trained else None
        B = TensorSpec(TRAINED_B, (site.rows, a), axis=1) if "B" in self.trained else None
        return [
            A or TensorSpec(FIXED_A, (b, site.cols), role="saved"),
            B or TensorSpec(FIXED_B, (site.rows, a), role="saved"),
        ]

    def find(self, weight: Tensor, site: Site) -> Found | None:
        """The bases of `weight` `[out, in]`, fp32; None where they do not follow from it."""
        return None

    def factors(self, tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
        """B and A; `tensors` are the layer's, by name."""
        A = tensors[TRAINED_A if "A" in self.trained else FIXED_A]
        return tensors[TRAINED_B if "B" in self.trained else FIXED_B], A


@register_part("svd")
@dataclass(frozen=True)
class SVD(Bases):
    r"""The leading singular vectors of the weight, :math:`W \approx U_r \Sigma_r V_r^\top`: :math:`B = U_r` and
    :math:`A = V_r^\top`, or :math:`\Sigma_r V_r^\top` with `values_in_A`.

    Of a quantised weight it is the SVD of what it dequantises to. Both are saved: another library or device finds other
    signs, and rotations among equal values, under which a trained core means nothing.
    """

    values_in_A: bool = False
    train_B: bool = False
    """Whether B is trained as well (LaMDA)."""

    @property
    def trained(self) -> frozenset[str]:
        """B with `train_B`."""
        return frozenset({"B"} if self.train_B else ())

    def find(self, weight: Tensor, site: Site) -> Found:
        """The truncated SVD."""
        U, values, Vh = truncated_svd(weight, site.r)
        return Found(values[:, None] * Vh if self.values_in_A else Vh, U, values)
