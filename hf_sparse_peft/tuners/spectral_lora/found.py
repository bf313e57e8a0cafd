"""Bases that are found in a weight, or in its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.seeded import seeded_uniform
from ...sparsity import MeanGradient, Statistic
from ...sparsity.decomposition import truncated_svd
from ...utils.option_types import PositiveFloat, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .bases import Bases, Found, RankChoice, Site
from .names import FINGERPRINT, FIXED_A, FIXED_B


@register_part("svd")
@dataclass(frozen=True)
class SVD(Bases):
    r"""The leading singular vectors of the weight, :math:`W \approx U_r \Sigma_r V_r^\top`: :math:`B = U_r` and
    :math:`A = V_r^\top`, or :math:`\Sigma_r V_r^\top` with `values_in_A`.

    Of a quantised weight it is the SVD of what it dequantises to. Another library or device finds other signs, and
    rotations among equal values, under which a trained core means nothing: by default the file has the bases. With
    `saved=False` it has two numbers a component to know them by, and they are found in the base's weight again where
    the adapter is used first; signs are put right, and a base that gives others is refused.
    """

    values_in_A: bool = False
    """Whether A is multiplied by the singular values."""
    train_B: bool = False
    """Whether B is trained as well (LaMDA)."""
    ranks: RankChoice | None = None
    """How many components each weight gets, `Energy(0.99)` or `SpectrumSpread()`; None: r."""

    saved: bool = True
    """Whether files have the bases."""

    @property
    def trained(self) -> frozenset[str]:
        """B with `train_B`."""
        return frozenset({"B"} if self.train_B else ())

    @property
    def recomputed(self) -> bool:
        """With `saved=False`."""
        return not self.saved

    @property
    def derived_names(self) -> tuple[str, ...]:
        """The bases that are not saved."""
        fixed = (FIXED_A,) if self.train_B else (FIXED_A, FIXED_B)
        return fixed if self.recomputed else ()

    def specs(self, site: Site) -> list[TensorSpec]:
        """The bases, or what they are known by."""
        found = [spec for spec in super().specs(site) if spec.name not in self.derived_names]
        return [*found, TensorSpec(FINGERPRINT, (2, site.r), role="saved")] if self.recomputed else found

    @staticmethod
    def fingerprint(found: Found, site: Site) -> Tensor:
        """`[2, r]`: each component's inner products with a fixed random vector on either side."""
        left = seeded_uniform(site.stream("left"), site.rows, device=found.B.device)
        right = seeded_uniform(site.stream("right"), site.cols, device=found.A.device)
        return torch.stack([left @ found.B, (found.A @ right) / found.A.norm(dim=1).clamp_min(1e-30)])

    def derive_from(self, found: Found, fingerprint: Tensor, site: Site) -> dict[str, Tensor]:
        """The bases with the signs of those that the core belongs to."""
        here = self.fingerprint(found, site)
        signs = torch.where((here * fingerprint).sum(0) < 0, -1.0, 1.0)
        if not torch.allclose(here * signs, fingerprint, rtol=0, atol=1e-3 * float(fingerprint.abs().max())):
            raise ValueError(
                f"The singular vectors of '{site.name}' here are not those that the adapter was trained with: it is "
                "another base, another rounding of it, or one with equal singular values. Train with SVD(saved=True)."
            )
        both = {FIXED_A: found.A * signs[:, None], FIXED_B: found.B * signs}
        return {name: both[name] for name in self.derived_names}

    @property
    def rank_choice(self) -> RankChoice | None:
        """`ranks`."""
        return self.ranks

    def find(self, weight: Tensor, site: Site) -> Found:
        """The truncated SVD."""
        U, values, Vh = truncated_svd(weight, site.r)
        return Found(values[:, None] * Vh if self.values_in_A else Vh, U, values)


@register_part("gradient_svd")
@dataclass(frozen=True)
class GradientSVD(Bases):
    r"""The leading singular vectors of the first step of full fine-tuning with Adam, :math:`D = -\eta_0\,
    \mathrm{sign}(\sum_i \nabla_W \ell_i)`: :math:`B = U_r`, :math:`A = V_r^\top` and the values for a core that starts
    there (LoRA-SB; Ponkshe et al., 2024; official code RaghavSinghal10/lora-sb).

    The gradients are read from the training data at the start of training, in evaluation mode (the official code's is
    training mode); until then the layer computes as its base. Where the data says nothing about a layer, its bases are
    those of the weight, and the core starts at 0. Both are saved.
    """

    step_size: PositiveFloat = 3e-7
    r""":math:`\eta_0`. The official code takes the learning rate over the warm-up steps of its estimation batches: 3e-7
    for 50,000 examples of MetaMath. Where it is too large the start already hurts."""
    examples: PositiveInt = 50
    """Examples to read, over all ranks (official code: 50 for arithmetic, 170 for commonsense)."""

    @property
    def statistic(self) -> Statistic:
        """The mean gradient."""
        return MeanGradient(self.examples)

    def find_in(self, state: dict[str, Tensor] | None, weight: Tensor, site: Site) -> Found:
        """The truncated SVD of the step."""
        if state is None:
            U, values, Vh = truncated_svd(weight, site.r)
            return Found(Vh, U, torch.zeros_like(values))
        U, values, Vh = truncated_svd(state["mean"].sign_().mul_(-self.step_size), site.r)
        return Found(Vh, U, values)


@register_part("ldu")
@dataclass(frozen=True)
class LDU(Bases):
    r"""The first r pivots of :math:`W = P L D U` with partial pivoting, `L` and `U` of unit diagonal: `B` the first r
    columns of :math:`P L`, `A` the first rows of `U`, and D's entries for a spectrum (LoLDU; Shi et al., 2024).

    Both are saved, because devices choose other pivots. They are the first pivots, not the largest, and neither basis
    is orthogonal.
    """

    def find(self, weight: Tensor, site: Site) -> Found:
        """The factors, computed in fp64.

        Raises:
            ValueError: a pivot is 0: the weight is singular.
        """
        P, L, U = torch.linalg.lu(weight.double())
        pivots = U.diagonal()[: site.r]
        if not pivots.all():
            raise ValueError(
                f"'{site.name}' has rank {int(pivots.ne(0).sum())} in its first {site.r} pivots, and LDU divides by "
                "them. Lower r, or leave the module out with exclude_modules."
            )
        A = U[: site.r] / pivots[:, None]
        return Found(A.float(), (P @ L[:, : site.r]).float(), pivots.float())
