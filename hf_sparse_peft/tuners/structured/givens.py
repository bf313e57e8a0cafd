r"""`Givens` and `QuasiGivens`: maps of a layer's input that are rounds of small maps of disjoint pairs.

An input of d numbers goes through :math:`\lceil \log_2 d \rceil` rounds of 2 x 2 maps: round k pairs i with
:math:`i + 2^k` for each multiple i of :math:`2^{k+1}`, so that each round has half the pairs of the one before, d - 1
in all, and :math:`Q = G_1 G_2 \cdots`: an input meets the last round first. A number without a partner is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Mapped, Site, Tensors

# Every Trainer keeps weight decay, which would pull what starts at 1 to 0, off parameters with `layernorm` in their
# names.
LENGTHS, BLOCKS = "layernorm_lengths", "layernorm_blocks"


@dataclass(frozen=True)
class PairRounds(Mapped):
    """Base of both: rounds of 2 x 2 maps of the input, computed in fp32 or wider, in about 2 d products a token."""

    wiring: Literal["paper", "released"] = "paper"
    """`released`: every round acts on adjacent inputs, 2 j and 2 j + 1, as GOFT's published layer has it, while its
    numbers lie at the pairs of the paper: of most pairs one half is changed and the other is not, so that the map is no
    rotation beyond two inputs. Only for even numbers of inputs."""
    maps_input: ClassVar[bool] = True

    def blocks(self, tensors: Tensors) -> Tensor:
        """The 2 x 2 maps of all pairs, round after round, `[cols - 1, 2, 2]`."""
        raise NotImplementedError

    def map_input(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        r""":math:`X Q^\top`."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        blocks = self.blocks(tensors).to(wide.dtype)
        mapped = _rounds(wide, blocks, 0) if self.wiring == "paper" else _adjacent_rounds(wide, blocks)
        return self._stretched(mapped, tensors).to(x.dtype)

    def _stretched(self, x: Tensor, tensors: Tensors) -> Tensor:
        return x

    def _check_site(self, site: Site) -> None:
        if site.cols < 2:
            raise ValueError(
                f"{type(self).__name__} pairs inputs, and '{site.name}' has {site.cols}. Leave the module out with "
                "exclude_modules."
            )
        if self.wiring == "released" and site.cols % 2:
            raise ValueError(
                f"{type(self).__name__}.wiring='released' needs an even number of inputs, and '{site.name}' has "
                f"{site.cols}. Set wiring='paper', or leave the module out with exclude_modules."
            )


@register_part("givens")
@dataclass(frozen=True)
class Givens(PairRounds):
    r""":math:`W Q x` with Q a product of d - 1 Givens rotations, an orthogonal matrix of d - 1 angles that start at 0
    (GOFT; Ma et al., 2024).

    Each pair of inputs becomes :math:`(\cos\theta\,l - \sin\theta\,r,\ \sin\theta\,l + \cos\theta\,r)`. Norms of the
    rows of W and the angles between them stay what they are.
    """

    bounded: bool = False
    r"""Whether :math:`\theta = \pi\tanh p` with p trained, as in the published code; else :math:`\theta` trains."""
    lengths: bool = False
    r"""Whether :math:`\gamma` `[d]`, from 1, trains too, :math:`W\,\mathrm{diag}(\gamma)\,Q x`, as in the published
    code."""
    tensor_names: ClassVar[tuple[str, ...]] = ("angles", LENGTHS)

    def specs(self, site: Site) -> list[TensorSpec]:
        """`[cols - 1]` angles and, with `lengths`, `[cols]`."""
        self._check_site(site)
        lengths = TensorSpec(LENGTHS, (site.cols,), start=lambda _: torch.ones(site.cols))
        return [TensorSpec("angles", (site.cols - 1,)), *([lengths] if self.lengths else [])]

    def blocks(self, tensors: Tensors) -> Tensor:
        """The rotations, their sines and cosines in the angles' dtype or, where that is narrower, in fp32."""
        angles = tensors["angles"]
        angles = angles.to(torch.promote_types(angles.dtype, torch.float32))
        angles = math.pi * angles.tanh() if self.bounded else angles
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((cos, -sin, sin, cos), -1).unflatten(-1, (2, 2))

    def _stretched(self, x: Tensor, tensors: Tensors) -> Tensor:
        return x * tensors[LENGTHS].to(x.dtype) if self.lengths else x


@register_part("quasi_givens")
@dataclass(frozen=True)
class QuasiGivens(PairRounds):
    r""":math:`W Q x` with Q rounds of d - 1 free 2 x 2 maps in the place of rotations, which start at the identity
    (qGOFT; Ma et al., 2024): each pair :math:`p = (l, r)` of inputs becomes
    :math:`(\langle \alpha_i, p \rangle, \langle \beta_i, p \rangle)`.

    They may change norms and, slightly, angles: the rule `PairOrthogonality` pulls :math:`\langle \alpha_i, \beta_i
    \rangle` to 0. They are its units, of kind "pair", and have no weight decay in a Trainer, which would pull them from
    the identity to 0.
    """

    tensor_names: ClassVar[tuple[str, ...]] = (BLOCKS,)

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Pairs."""
        return frozenset({"pair"})

    def specs(self, site: Site) -> list[TensorSpec]:
        """`[cols - 1, 2, 2]`, a pair each; its rows are alpha and beta."""
        self._check_site(site)
        count = site.cols - 1
        return [TensorSpec(BLOCKS, (count, 2, 2), space="pair", start=lambda _: torch.eye(2).repeat(count, 1, 1))]

    def blocks(self, tensors: Tensors) -> Tensor:
        """The parameter itself."""
        return tensors[BLOCKS]


def _rounds(x: Tensor, blocks: Tensor, first: int) -> Tensor:
    """The rounds from the one on whose maps begin at `first`, of the inputs that are left for it, the last one first.
    The inputs of later rounds are a half of those of this one: all of it costs two rounds, however many there are."""
    count = x.shape[-1]
    if count == 1:
        return x
    pairs = count // 2
    inner = _rounds(x[..., ::2], blocks, first + pairs)
    left, right = inner[..., :pairs], x[..., 1::2]
    (a, b), (c, d) = blocks[first : first + pairs].permute(1, 2, 0)
    both = torch.stack((a * left + b * right, c * left + d * right), -1).flatten(-2)
    return torch.cat((both, inner[..., pairs:]), -1) if count % 2 else both


def _adjacent_rounds(x: Tensor, blocks: Tensor) -> Tensor:
    cols, count, first, rounds = x.shape[-1], x.shape[-1], 0, []
    while count > 1:
        pairs = count // 2
        rounds.append((2 ** len(rounds), blocks[first : first + pairs]))
        first, count = first + pairs, count - pairs
    for stride, held in reversed(rounds):
        left = torch.arange(len(held), device=x.device) * 2 * stride
        own = x.new_ones(cols).index_copy(0, left, held[:, 0, 0]).index_copy(0, left + stride, held[:, 1, 1])
        other = x.new_zeros(cols).index_copy(0, left, -held[:, 0, 1]).index_copy(0, left + stride, held[:, 1, 0])
        swapped = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        x = x * own + swapped * other
    return x
