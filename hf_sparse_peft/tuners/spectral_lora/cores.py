r"""Cores: the small trained matrix `C` `[a, b]` between two bases, :math:`\Delta W = s\,B\,C\,A`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...utils.option_types import NonNegativeInt, PositiveFloat
from ...utils.parts import Part, register_part
from ...utils.tensors import TensorSpec
from .bases import Site
from .names import CORE, CORE_A, CORE_B, MASK, SCALE


@dataclass(frozen=True)
class Core(Part):
    r"""Base of the forms of the trained matrix `C` `[a, b]`.

    With a `residual` :math:`C_0` the update is :math:`s\,B\,(C - C_0)\,A`. For `residual="init"` it is what the core
    starts with, so that training begins at the base model; for `"values"` the spectrum that the bases found.
    """

    part_kind: ClassVar[str] = "core"
    # Without annotations, which would put them before the fields of the forms that have them as options.
    residual = None
    trained_scale = False
    """Whether s is trained too; `matrix` contains it then."""
    diagonal = False
    """Whether `matrix` is the diagonal alone."""
    masked = False
    """Whether components may die."""

    def specs(self, a: int, b: int, site: Site) -> list[TensorSpec]:
        """The tensors of a core `[a, b]`; r and s are `site`'s.

        Raises:
            ValueError: the form has no such shape.
        """
        raise NotImplementedError

    def start(self, tensors: Mapping[str, Tensor], values: Tensor | None) -> None:
        """Write the first content where it follows from `values`, the spectrum of the bases in falling order.

        Raises:
            ValueError: it does, and the bases have none.
        """

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """C, `[a, b]`, or its diagonal `[a]`, with gradients; `tensors` are the layer's, by name."""
        raise NotImplementedError

    def around(self, B: Tensor, A: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Two factors of :math:`B C A`, where there are some of a rank below that of B and A; else None."""
        return None

    def known(self, values: Tensor | None) -> Tensor:
        """`values`, where there are any.

        Raises:
            ValueError: the bases have none.
        """
        if values is None:
            raise ValueError(
                f"{type(self).__name__}.init={self.init!r} starts from a spectrum, which only bases of the weight or "
                "of its gradient have, such as SVD(). Choose other bases or another init."
            )
        return values


@register_part("full")
@dataclass(frozen=True)
class Full(Core):
    r"""A full matrix (LoRA-XS; Bałazy et al., 2024)."""

    init: Literal["normal", "zeros", "values"] = "normal"
    """`normal`: N(0, std^2); `values`: the spectrum of the bases on the diagonal."""
    std: PositiveFloat = 1e-5
    """Of `normal`."""
    residual: Literal["init", "values"] | None = None
    """What :math:`C_0` is; None: 0."""

    def specs(self, a: int, b: int, site: Site) -> list[TensorSpec]:
        """`[a, b]`, whose rows are the units of kind "core"."""

        def start(generator: torch.Generator | None) -> Tensor:
            return torch.randn(a, b, generator=generator) * self.std

        return [TensorSpec(CORE, (a, b), space="core", start=start if self.init == "normal" else None)]

    def start(self, tensors: Mapping[str, Tensor], values: Tensor | None) -> None:
        """Write the spectrum on the diagonal."""
        if self.init == "values":
            tensors[CORE].copy_(torch.diag(self.known(values)))

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter itself."""
        return tensors[CORE]


@register_part("diagonal")
@dataclass(frozen=True)
class Diagonal(Core):
    r"""A diagonal: one number a component (SVFit, S2-LoRA), with `trained_scale` :math:`s\,\mathrm{diag}(z)` with a
    trained s that starts at `lora_alpha / r` (LoLDU)."""

    init: Literal["zeros", "ones", "normal", "uniform", "values", "values_mean", "values_normal", "values_uniform"] = (
        "zeros"
    )
    """`normal`: N(0, 1), `uniform`: U(-1, 1). Of the bases' spectrum d: d itself, its mean m, N(m, std(d)^2), or
    U(-m/2, m/2)."""
    residual: Literal["init", "values"] | None = None
    """What :math:`C_0` is; None: 0."""
    trained_scale: bool = False
    """Whether s is trained too."""
    masked: bool = False
    """Whether components may die, noted in a mask. Set at injection where a rule needs it."""
    diagonal = True

    def specs(self, a: int, b: int, site: Site) -> list[TensorSpec]:
        """`[a]`, whose numbers are the units of kind "core", and `[1]` for a trained s."""
        first = {
            "ones": lambda _: torch.ones(a),
            "normal": lambda generator: torch.randn(a, generator=generator),
            "uniform": lambda generator: torch.rand(a, generator=generator) * 2 - 1,
        }
        if a != b:
            raise ValueError(f"A diagonal core is square, and its bases have {a} and {b} components.")
        found = [TensorSpec(CORE, (a,), space="core", start=first.get(self.init))]
        if self.masked:
            ones = partial(torch.ones, a, dtype=torch.uint8)
            found.append(
                TensorSpec(MASK, (a,), torch.uint8, "saved", "core", start=lambda _: ones(), check=_check_mask)
            )
        if self.trained_scale:
            found.append(TensorSpec(SCALE, (1,), start=lambda _: torch.full((1,), site.scaling)))
        return found

    def start(self, tensors: Mapping[str, Tensor], values: Tensor | None) -> None:
        """Write what follows from the spectrum, drawn from torch's generator."""
        if not self.init.startswith("values"):
            return
        core, d = tensors[CORE], self.known(values)
        mean = d.mean().item()
        if self.init == "values":
            core.copy_(d)
        elif self.init == "values_mean":
            core.fill_(mean)
        elif self.init == "values_normal":
            core.normal_(mean, d.std().item())
        else:
            core.uniform_(-abs(mean) / 2, abs(mean) / 2)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The diagonal `[a]`, times the trained s."""
        return tensors[CORE] * tensors[SCALE] if self.trained_scale else tensors[CORE]


def _check_mask(tensor: Tensor, key: str) -> None:
    if tensor.dtype != torch.uint8 or bool((tensor > 1).any()):
        raise ValueError(f"'{key}' must be uint8 of 0 and 1; the file is damaged.")


@register_part("band")
@dataclass(frozen=True)
class Band(Core):
    r"""The diagonals up to `width` away from the main one: :math:`C_{ij} \neq 0` for :math:`|i - j| \le w`."""

    width: NonNegativeInt = 1
    """The furthest diagonal."""

    def specs(self, a: int, b: int, site: Site) -> list[TensorSpec]:
        """`[a, 2 w + 1]`: row i holds :math:`C_{i,i-w}, \\dots, C_{i,i+w}`; what lies outside of C has no effect."""
        if a != b:
            raise ValueError(f"A band is square, and its bases have {a} and {b} components.")
        return [TensorSpec(CORE, (a, 2 * self.width + 1), space="core")]

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """C, `[a, a]`."""
        band = tensors[CORE]
        a, diagonals = band.shape
        at = torch.arange(a, device=band.device)[:, None] + torch.arange(diagonals, device=band.device)
        padded = band.new_zeros(a, a + diagonals - 1).scatter(1, at, band)
        return padded[:, self.width : self.width + a]


@register_part("two_factors")
@dataclass(frozen=True)
class TwoFactors(Core):
    r"""A product of rank r, :math:`C = C_B\,C_A` with `C_B` `[a, r]` = 0 and `C_A` `[r, b]` Kaiming-uniform at the
    start, for bases of more than r components (LoRA-Mini; Singh et al., 2024)."""

    def specs(self, a: int, b: int, site: Site) -> list[TensorSpec]:
        """Both factors; units of kind "core" are the r products."""

        def start(generator: torch.Generator | None) -> Tensor:
            return nn.init.kaiming_uniform_(torch.empty(site.r, b), a=math.sqrt(5), generator=generator)

        spec = partial(TensorSpec, space="core")
        return [spec(CORE_A, (site.r, b), start=start), spec(CORE_B, (a, site.r), axis=1)]

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """C, `[a, b]`."""
        return tensors[CORE_B] @ tensors[CORE_A]

    def around(self, B: Tensor, A: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """:math:`B C_B` `[out, r]` and :math:`C_A A` `[r, in]`, which have fewer components than B and A."""
        return B @ tensors[CORE_B], tensors[CORE_A] @ A
