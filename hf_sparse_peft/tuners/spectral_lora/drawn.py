"""Bases that are drawn from the adapter's seed and the module's name, and are in no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...ops.seeded import seeded_combination, seeded_uniform
from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .bases import Bases, Site
from .names import COEFFICIENTS_A, COEFFICIENTS_B, FIXED_A, FIXED_B


@register_part("random")
@dataclass(frozen=True)
class RandomBases(Bases):
    r"""Kaiming-uniform matrices, :math:`A \sim U(\pm 1/\sqrt{in})` and :math:`B \sim U(\pm 1/\sqrt{a})`, that follow
    from the seed and the module's name: in memory while the adapter is, in no file (LoRA-Mini's outer factors)."""

    a: PositiveInt | None = None
    """Columns of B; None: r."""
    b: PositiveInt | None = None
    """Rows of A; None: r."""
    derived_names: ClassVar[tuple[str, ...]] = (FIXED_A, FIXED_B)
    drawn: ClassVar[bool] = True

    def inner(self, site: Site) -> tuple[int, int]:
        """`a` and `b`, at most the weight's sides."""
        return min(self.a or site.r, site.rows), min(self.b or site.r, site.cols)

    def specs(self, site: Site) -> list[TensorSpec]:
        """None."""
        return []

    def derive(self, site: Site, device: torch.device | None) -> dict[str, Tensor]:
        """Both bases."""
        a, b = self.inner(site)
        return {
            FIXED_A: seeded_uniform(site.stream("A"), b, site.cols, device=device) * site.cols**-0.5,
            FIXED_B: seeded_uniform(site.stream("B"), site.rows, a, device=device) * a**-0.5,
        }


@register_part("random_combination")
@dataclass(frozen=True)
class RandomCombination(Bases):
    r"""Trained sums of random matrices, :math:`A = A_0 + \sum_i \alpha_i A_i` and :math:`B = \sum_j \beta_j B_j` (NOLA;
    Koohpayegani et al., 2024; official code UCDvision/NOLA).

    `init="offset"` is the code's form for language models: entries of :math:`A_i`, :math:`B_j` are
    :math:`U(-1, 1)/\sqrt{k}`, coefficients start at 0, and :math:`A_0` is Kaiming-uniform and fixed. `"mean"` is its
    form for vision: Kaiming-uniform :math:`A_i`, :math:`B_j`, coefficients that start at 1/k, no :math:`A_0`, so that
    the update is not 0 at the start. All matrices follow from the seed and the module's name, and are drawn a few at a
    time in every pass, forwards and backwards; files have the coefficients.
    """

    k: PositiveInt = 512
    """Matrices of A."""
    l: PositiveInt | None = None  # noqa: E741 (the paper's name)
    """Matrices of B; None: k."""
    init: Literal["offset", "mean"] = "offset"
    """Which of the code's two forms."""
    trained: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    drawn: ClassVar[bool] = True

    @property
    def derived_names(self) -> tuple[str, ...]:
        """A_0, where there is one."""
        return (FIXED_A,) if self.init == "offset" else ()

    def specs(self, site: Site) -> list[TensorSpec]:
        """Both lists of coefficients, whose numbers are the units of kind "core"."""

        def start(count: int, _: torch.Generator | None) -> Tensor:
            return torch.full((count,), 1 / count if self.init == "mean" else 0.0)

        sizes = {COEFFICIENTS_A: self.k, COEFFICIENTS_B: self.l or self.k}
        return [TensorSpec(name, (count,), start=partial(start, count)) for name, count in sizes.items()]

    def derive(self, site: Site, device: torch.device | None) -> dict[str, Tensor]:
        """A_0."""
        if self.init == "mean":
            return {}
        return {FIXED_A: seeded_uniform(site.stream("A0"), site.r, site.cols, device=device) * site.cols**-0.5}

    def factors(self, tensors: Mapping[str, Tensor], site: Site) -> tuple[Tensor, Tensor]:
        """The sums, fp32."""
        by_count = self.init == "offset"
        alpha, beta = tensors[COEFFICIENTS_A], tensors[COEFFICIENTS_B]
        scales = [n**-0.5 for n in ((alpha.numel(), beta.numel()) if by_count else (site.cols, site.r))]
        A = seeded_combination(alpha, site.stream("A"), site.r, site.cols, scales[0])
        B = seeded_combination(beta, site.stream("B"), site.rows, site.r, scales[1])
        return B, A + tensors[FIXED_A] if by_count else A
