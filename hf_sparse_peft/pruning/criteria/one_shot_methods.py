"""One-shot pruning methods: what of a weight goes, by the weight alone or by the inputs that reach it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...sparsity import stream_seed
from ...utils.option_types import NonNegativeFloat, PositiveInt
from ...utils.parts import Part, register_part
from ..reading.input_statistics import HESSIAN, SQUARES, InputStatistics
from .pruning_patterns import NM, PruningPattern


class PruningMethod(Part):
    """A way to prune one linear weight in one shot."""

    part_kind: ClassVar[str] = "pruning_method"
    reads: ClassVar[frozenset[str]] = frozenset()
    """What it wants to know of the layer's inputs (`InputStatistics`)."""
    group: ClassVar[str] = "layer"
    """What competes where the pattern leaves it to the method: "row" or "layer"."""
    changes_weights: ClassVar[bool] = False
    """Whether weights that are kept change too, so that no mask alone can say the result."""

    def all_reads(self) -> frozenset[str]:
        """`reads`, and what parts of it read."""
        return self.reads

    def prune(
        self,
        weight: Tensor,
        inputs: InputStatistics | None,
        sparsity: float,
        pattern: PruningPattern,
        name: str = "",
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The pruned weight and which of its entries are gone.

        Args:
            weight: `[rows, cols]`, fp32; it is left as it is.
            inputs: what the method reads; None where that is nothing.
            sparsity: fraction of entries that go.
            pattern: where they may lie.
            name: the layer's, for random draws.
            seed: of random draws.

        Returns:
            fp32 `[rows, cols]` and bool `[rows, cols]`.
        """
        gone = pattern.removed(self.scores(weight, inputs, name, seed), sparsity, self.group)
        return weight.masked_fill(gone, 0), gone

    def scores_entries(self) -> bool:
        """Whether what goes follows from `scores` alone, so that norms of them rank rows, heads or tiles."""
        return type(self).prune is PruningMethod.prune and type(self).scores is not PruningMethod.scores

    def scores(self, weight: Tensor, inputs: InputStatistics | None, name: str, seed: int) -> Tensor:
        """What ranks the entries, `[rows, cols]`, the highest kept first."""
        raise NotImplementedError


@register_part("magnitude")
@dataclass(frozen=True)
class MagnitudePruning(PruningMethod):
    """The smallest :math:`|w|` of a whole weight go."""

    def scores(self, weight: Tensor, inputs: InputStatistics | None, name: str, seed: int) -> Tensor:
        """:math:`|w|`."""
        return weight.abs()


@register_part("random")
@dataclass(frozen=True)
class RandomPruning(PruningMethod):
    """Any entries go, by the seed and the layer's name: the baseline."""

    def scores(self, weight: Tensor, inputs: InputStatistics | None, name: str, seed: int) -> Tensor:
        """Uniform numbers."""
        generator = torch.Generator().manual_seed(stream_seed(seed, name))
        return torch.rand(weight.shape, generator=generator).to(weight.device)


@register_part("wanda")
@dataclass(frozen=True)
class Wanda(PruningMethod):
    r"""Weights times the norm of their inputs, :math:`S_{ij} = |w_{ij}| \sqrt{\frac1N \sum_t x_{tj}^2}`; entries of an
    output row compete (Sun et al., 2024; official code locuslab/wanda)."""

    reads: ClassVar[frozenset[str]] = frozenset({SQUARES})
    group: ClassVar[str] = "row"

    def scores(self, weight: Tensor, inputs: InputStatistics, name: str, seed: int) -> Tensor:
        """See the class."""
        return weight.abs() * inputs.mean_square().sqrt()


@register_part("sparsegpt")
@dataclass(frozen=True)
class SparseGPT(PruningMethod):
    r"""Entries with the smallest :math:`w_{ij}^2 / U_{jj}^2` go, and what their loss does to the outputs is made up for
    by the entries to the right of them (Frantar and Alistarh, 2023; official code IST-DASLab/sparsegpt).

    `U` is the upper Cholesky factor of the inverse of :math:`H = \frac2N \sum_t x_t x_t^\top + \lambda I`, with
    `damping` times the mean of H's diagonal as :math:`\lambda`. Columns are taken from left to right, `block` at a
    time: unstructured, the entries of a block's columns over all rows compete (exactly `int(sparsity * n)` go); of a
    pattern, those of each group. Inputs that are always 0 lose their weights first. Ties go to the earlier entry.

    fp32, the inverse in float64. Raises `ValueError` for an H that has no inverse.
    """

    damping: NonNegativeFloat = 0.01
    """What is added to H's diagonal, as a fraction of its mean."""
    block: PositiveInt = 128
    """Columns whose entries compete, a multiple of a pattern's group."""

    reads: ClassVar[frozenset[str]] = frozenset({HESSIAN})
    changes_weights: ClassVar[bool] = True

    def prune(
        self,
        weight: Tensor,
        inputs: InputStatistics,
        sparsity: float,
        pattern: PruningPattern,
        name: str = "",
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See `PruningMethod`."""
        if isinstance(pattern, NM) and self.block % pattern.of:
            raise ValueError(f"SparseGPT.block={self.block} cuts groups of {pattern.of}: take a multiple of it.")
        factor, dead = self._factor(inputs.hessian(), name)
        weight = weight.masked_fill(dead, 0)
        gone = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        cols = weight.shape[1]
        for begin in range(0, cols, self.block):
            end = min(begin + self.block, cols)
            part, upper = weight[:, begin:end], factor[begin:end, begin:end]
            taken = gone[:, begin:end]
            losses = _prune_columns(part, upper, taken, sparsity, pattern)
            weight[:, end:] -= losses @ factor[begin:end, end:]
        return weight, gone

    def _factor(self, hessian: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """U `[cols, cols]`, and which inputs are always 0."""
        wide = hessian.double()
        diagonal = wide.diagonal()
        dead = diagonal == 0
        diagonal[dead] = 1
        diagonal += self.damping * diagonal.mean()
        lower, failed = torch.linalg.cholesky_ex(wide)
        if failed or not lower.isfinite().all():
            raise ValueError(
                f"SparseGPT: the inputs of '{name}' are not finite, or so alike that H has no inverse. Raise "
                f"damping={self.damping}, or calibrate with more tokens than the {len(wide)} inputs."
            )
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        return upper.to(hessian.dtype), dead


def _prune_columns(part: Tensor, upper: Tensor, gone: Tensor, sparsity: float, pattern: PruningPattern) -> Tensor:
    """Prune columns `part` `[rows, c]` in place from left to right, mark what went in `gone`; returns the losses that
    the columns behind them make up for, `[rows, c]`."""
    grouped = isinstance(pattern, NM)
    if not grouped:
        gone |= pattern.removed(part.square() / upper.diagonal().square(), sparsity, SparseGPT.group)
    losses = torch.zeros_like(part)
    for at in range(part.shape[1]):
        if grouped and at % pattern.of == 0:
            group = slice(at, at + pattern.of)
            scores = part[:, group].square() / upper.diagonal()[group].square()
            gone[:, group] = pattern.removed(scores, sparsity, SparseGPT.group)
        lost = part[:, at].masked_fill(~gone[:, at], 0)
        losses[:, at] = lost / upper[at, at]
        part[:, at] -= lost
        part[:, at + 1 :] -= losses[:, at, None] * upper[at, at + 1 :]
    return losses
