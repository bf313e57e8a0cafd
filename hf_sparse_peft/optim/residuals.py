"""Residuals: what becomes of the part of a gradient that a projection leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..utils.option_types import NonNegativeFloat
from ..utils.parts import Part, register_part


@dataclass(frozen=True)
class Residual(Part):
    """Base of what `ProjectedAdamW(residual=...)` takes: an update without moments for the rest of the gradient."""

    part_kind: ClassVar[str] = "residual"
    needs_axis: ClassVar[bool] = False
    """Whether it needs a projection that leaves one axis of the matrix as it is (`Projection.kept_axis`)."""

    def update(self, rest: Tensor, small: Tensor, step: Tensor, axis: int, state: dict[str, Tensor]) -> Tensor:
        """The update of the rest, which the learning rate multiplies.

        Args:
            rest: what the projection leaves of the gradient, `[m, n]`; may be used up.
            small: the projected gradient.
            step: what Adam makes of that, of its shape.
            axis: the axis of the matrix that is not projected.
            state: the parameter's; the residual may keep 0-dim tensors in it.
        """
        raise NotImplementedError


@register_part("norm_scaled")
@dataclass(frozen=True)
class NormScaledResidual(Residual):
    r"""The rest :math:`S` of the gradient, every row (column) scaled by what Adam did to the norm of that of the
    projected one, its growth limited (Fira; Chen et al., 2024):

    .. math::
        E = \phi \odot S, \quad \phi_j = \frac{\|N_j\|}{\|R_j\| + 10^{-8}}, \qquad
        E \leftarrow E \,/\, \max\!\Big(\frac{\|E\|}{\gamma\,(\|E_{t-1}\| + 10^{-8})},\, 1\Big)

    where :math:`\|E_{t-1}\|` is the norm of the last step's limited one: `residual_norm`, a 0-dim tensor of the state.
    A new choice of the subspace does not reset it.
    """

    growth: NonNegativeFloat = 1.01
    r"""Largest ratio :math:`\gamma` of two successive norms; 0: no limit."""

    needs_axis: ClassVar[bool] = True

    def update(self, rest: Tensor, small: Tensor, step: Tensor, axis: int, state: dict[str, Tensor]) -> Tensor:
        """As `Residual`."""
        phi = step.norm(dim=1 - axis, keepdim=True) / (small.norm(dim=1 - axis, keepdim=True) + 1e-8)
        rest = rest.mul_(phi)
        if self.growth:
            norm, last = rest.norm(), state.get("residual_norm")
            if last is None:
                state["residual_norm"] = norm
            else:
                over = (norm / (last + 1e-8)).clamp_(min=self.growth) / self.growth
                rest.div_(over)
                last.copy_(norm / over)
        return rest


@register_part("sign")
@dataclass(frozen=True)
class SignResidual(Residual):
    r""":math:`E = s\,\mathrm{sign}(S)`: every number outside of the subspace moves by `scale` times the learning
    rate, one whose gradient is 0 not at all (signSGD; FRUGAL; Zmushko et al., 2024). Clipping does not change it."""

    scale: NonNegativeFloat = 1.0
    """Learning rate of the rest over that of the projected part (FRUGAL: 1 to pre-train, 0.1 to fine-tune)."""

    def update(self, rest: Tensor, small: Tensor, step: Tensor, axis: int, state: dict[str, Tensor]) -> Tensor:
        """As `Residual`."""
        return rest.sign_().mul_(self.scale)


@register_part("sgd")
@dataclass(frozen=True)
class GradientResidual(Residual):
    """The rest itself, `scale` times the learning rate (SGD; FRUGAL; Zmushko et al., 2024)."""

    scale: NonNegativeFloat = 1.0
    """Learning rate of the rest over that of the projected part."""

    def update(self, rest: Tensor, small: Tensor, step: Tensor, axis: int, state: dict[str, Tensor]) -> Tensor:
        """As `Residual`."""
        return rest.mul_(self.scale)
