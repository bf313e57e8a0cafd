r"""Masks on the entries of the low-rank factors: which there are, and how they are drawn.

A map is a uint8 buffer of the factor's shape: `parallel` has mask i in bit i, `stochastic` the number of the expert
that owns the entry. It is drawn from the config's seed and the module's name, and saved with the adapter so that no
draw has to be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from ...sparsity import stream_seed
from ...utils.option_docs import document_options
from ...utils.option_types import PositiveFraction, Range, check_types


@document_options
@dataclass
class FactorMaskConfig:
    r"""Masks on the entries of the low-rank factors; drawn from `seed` and the module's name, saved with the adapter.

    `parallel` (CapaBoost; Song et al., 2024): :math:`\Delta W = s \sum_{i=1}^{d} (B \odot M^B_i)(A \odot M^A_i)` with
    `d = copies` fixed random mask pairs of exactly `int(density * numel)` ones: rank up to `d * r` from one pair of
    factors. `stochastic` (MoSA; Zhang et al., 2023): the entries are split over `experts` at random, in equal parts; a
    training forward uses one expert of each factor where the rule `FactorExperts` trains them, and the merge of all is
    used everywhere else.
    """

    kind: Literal["parallel", "stochastic"] = "parallel"
    """`parallel` masks (CapaBoost) or a `stochastic` split (MoSA)."""
    copies: Annotated[int, Range(least=1, most=8)] = 2
    """`parallel`: mask pairs, at most 8 (CapaBoost: 2)."""
    density: PositiveFraction = 0.5
    """`parallel`: fraction of ones in every mask (CapaBoost: 0.5, so that copies * density = 1 keeps the cost)."""
    experts: Annotated[int, Range(least=1, most=255)] = 4
    """`stochastic`: parts of a factor (MoSA: 4)."""
    split: Literal["both", "B"] = "both"
    """`stochastic`: whether both factors are split, or `B` alone beside one dense, shared `A` (MoSA's hierarchical
    form)."""
    merge: Literal["add", "joint"] = "add"
    """`stochastic`: what evaluation uses: `add`, the mean of the experts (a trained entry of `B` divided by `experts`),
    or `joint`, each entry as its owner has it."""

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def splits(self) -> bool:
        """Whether the entries are split over experts."""
        return self.kind == "stochastic"

    @property
    def largest(self) -> int:
        """Largest number that a map may hold."""
        return self.experts - 1 if self.splits else 2**self.copies - 1

    def masks(self, factor: str) -> bool:
        """Whether the factor "A" or "B" has a map."""
        return factor == "B" or not self.splits or self.split == "both"


def draw_map(masks: FactorMaskConfig, seed: int, module_name: str, factor: str, shape: tuple[int, int]) -> torch.Tensor:
    """uint8 `shape`: the map of the factor "A" or "B" of that module.

    Raises:
        ValueError: a mask or an expert would have no entry.
    """
    numel = shape[0] * shape[1]
    _check_entries(masks, module_name, factor, numel)
    generator = torch.Generator().manual_seed(stream_seed(seed, module_name, "factor_masks", factor))
    return (_owners if masks.splits else _mask_bits)(numel, masks, generator).view(shape)


def _check_entries(masks: FactorMaskConfig, module: str, factor: str, numel: int) -> None:
    """Raises `ValueError` where a mask has no entry: what it hides would never train."""
    if not masks.splits and int(masks.density * numel) == 0:
        raise ValueError(
            f"factor_masks.density={masks.density} leaves 0 of the {numel} entries of {factor} in '{module}': it would "
            f"never train. Set density to at least {1 / numel:.1e}, or raise r."
        )
    if masks.splits and masks.experts > numel:
        raise ValueError(
            f"factor_masks.experts={masks.experts} is more than the {numel} entries of {factor} in '{module}': some "
            f"experts would have 0 entries. Set experts to at most {numel}, or raise r."
        )


def _mask_bits(numel: int, masks: FactorMaskConfig, generator: torch.Generator) -> torch.Tensor:
    """uint8 `[numel]`: bit i is set for exactly `int(density * numel)` entries, a draw of its own for every i."""
    bits = torch.zeros(numel, dtype=torch.uint8, device="cpu")
    for copy in range(masks.copies):
        ones = torch.randperm(numel, generator=generator, device="cpu")[: int(masks.density * numel)]
        bits[ones] |= 1 << copy
    return bits


def _owners(numel: int, masks: FactorMaskConfig, generator: torch.Generator) -> torch.Tensor:
    """uint8 `[numel]`: the expert of every entry; parts differ by one entry at most."""
    owners = torch.empty(numel, dtype=torch.uint8, device="cpu")
    order = torch.randperm(numel, generator=generator, device="cpu")
    owners[order] = (torch.arange(numel, device="cpu") % masks.experts).to(torch.uint8)
    return owners
