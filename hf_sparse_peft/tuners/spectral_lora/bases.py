r"""Bases: what stands on both sides of a core, :math:`\Delta W = s\,B\,C\,A` with `B` `[out, a]`, `A` `[b, in]`.

SVD                 singular vectors of the weight, fixed or with a trained B; saved
LDU                 triangular factors of the weight; saved
RandomBases         drawn from a seed; in no file
RandomCombination   trained sums of random matrices, drawn from a seed anew in every pass (NOLA)
SharedBases, Shards trained, one for several modules: `shared.py`
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ...ops.seeded import seeded_combination, seeded_uniform
from ...sparsity import MeanGradient, Statistic, stream_seed
from ...sparsity.decomposition import truncated_svd
from ...utils.option_types import PositiveFloat, PositiveFraction, PositiveInt
from ...utils.parts import Part, register_part
from ...utils.tensors import TensorSpec

TRAINED_A, TRAINED_B = "spectral_lora_A", "spectral_lora_B"
FIXED_A, FIXED_B = "spectral_lora_basis_A", "spectral_lora_basis_B"
FINGERPRINT = "spectral_lora_fingerprint"
COEFFICIENTS_A, COEFFICIENTS_B = "spectral_lora_A_coefficients", "spectral_lora_B_coefficients"


class Sharing(NamedTuple):
    """The modules that share tensors with one."""

    owner: str
    """The first of them in model order, which has the tensors."""
    users: int
    """How many they are."""
    position: int
    """Which of them this one is, from 0."""


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


@dataclass(frozen=True)
class Bases(Part):
    """Base of the ways to get the two bases of a module."""

    part_kind: ClassVar[str] = "bases"
    trained: ClassVar[frozenset[str]] = frozenset()
    """Sides that are trained: "A", "B"."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that the owner has for all modules of a group."""
    derived_names: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that `derive` makes."""
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
    def ranks_by_weight(self) -> bool:
        """Whether the components of each module follow from its weight (`rank_of`), when the adapter is injected."""
        return False

    def rank_of(self, weight: Tensor) -> int:
        """Components for `weight` `[out, in]`, fp32; at most `r` of them are taken."""
        raise NotImplementedError

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
        """The tensors that follow from the seed and are worth keeping in memory, by name."""
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
    energy: PositiveFraction | None = None
    """Take the fewest components of each weight that have this fraction of its energy, at most r; None: r. It takes
    all singular values of all weights at injection."""
    energy_of: Literal["values", "squares"] = "squares"
    """What adds up to the energy: singular values or their squares."""

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
        held = [spec for spec in super().specs(site) if spec.name not in self.derived_names]
        return [*held, TensorSpec(FINGERPRINT, (2, site.r), role="saved")] if self.recomputed else held

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
    def ranks_by_weight(self) -> bool:
        """With an `energy`."""
        return self.energy is not None

    def rank_of(self, weight: Tensor) -> int:
        """The fewest components with that energy."""
        held = torch.linalg.svdvals(weight).double().pow(2 if self.energy_of == "squares" else 1).cumsum(0)
        return 1 + int((held < self.energy * held[-1]).sum())

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
