"""Masks that only the gradient of a layer's input goes through: N:M along the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..sparsity import n_of_m_mask, stream_seed
from ..utils.option_types import PositiveInt
from ..utils.parts import Part, register_part
from ..utils.tensors import TensorSpec
from .space import UnitSpace


@dataclass(frozen=True)
class InputMask(Part):
    r"""Base of the masks :math:`M_b` of :math:`dX = dY (M_b \odot V)`."""

    part_kind: ClassVar[str] = "input_mask"

    def check_space(self, space: UnitSpace, keep: int, of: int) -> None:
        """Raises `ValueError` where groups do not divide the outputs."""
        if space.weight_shape[0] % of:
            raise ValueError(
                f"{type(self).__name__}: groups of {of} do not divide the {space.weight_shape[0]} outputs of "
                f"'{space.name}'. Choose another N:M, or name the module in exclude_modules."
            )

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """What it keeps between steps."""
        return []

    def __call__(self, run: Any, space: UnitSpace, weight: Tensor, mask: Tensor, keep: int, of: int) -> Tensor:
        """Bool `[out, in]`: :math:`M_b` at a step, of the weight V and the forward's mask."""
        raise NotImplementedError


@register_part("output_groups")
@dataclass(frozen=True)
class OutputGroups(InputMask):
    """The `keep` largest magnitudes of every `of` outputs of the dense weight (BDWP; Fang et al., 2023)."""

    def __call__(self, run: Any, space: UnitSpace, weight: Tensor, mask: Tensor, keep: int, of: int) -> Tensor:
        """See the class."""
        return n_of_m_mask(weight.abs(), keep, of, axis=0)


@register_part("permuted_output_groups")
@dataclass(frozen=True)
class PermutedOutputGroups(InputMask):
    r"""The same of the masked weight with its outputs in another order, and within the forward's mask,
    :math:`M_b \subseteq M` (Bi-Mask; Zhang et al., 2023; official code zyxxmu/Bi-Mask).

    The order is the one of `draws` random ones with which most entries survive. The official code draws from numpy's
    global generator; here draws follow from the adapter's seed and the step.
    """

    draws: PositiveInt = 10
    """Random orders that are compared."""
    every: PositiveInt = 100
    """Steps after which the order is chosen anew."""

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """int64 `[out]`: the order, for a run that goes on."""
        return [TensorSpec("output_order", (space.weight_shape[0],), torch.int64, role="rule")]

    def __call__(self, run: Any, space: UnitSpace, weight: Tensor, mask: Tensor, keep: int, of: int) -> Tensor:
        """See the class."""
        magnitude, order = (weight * mask).abs(), space.state()["output_order"]
        if run.step % self.every == 0 or not order.any():
            seed = stream_seed(run.seed, space.name, "output order", run.step)
            order.copy_(self._best_order(magnitude, mask, keep, of, seed))
        return self._within(magnitude, mask, order, keep, of)

    def _best_order(self, magnitude: Tensor, mask: Tensor, keep: int, of: int, seed: int) -> Tensor:
        generator, best = torch.Generator().manual_seed(seed), (-1, None)
        for _ in range(self.draws):
            order = torch.randperm(mask.shape[0], generator=generator).to(mask.device)
            left = int(self._within(magnitude, mask, order, keep, of).sum())
            best = max(best, (left, order), key=lambda pair: pair[0])
        return best[1]

    def _within(self, magnitude: Tensor, mask: Tensor, order: Tensor, keep: int, of: int) -> Tensor:
        found = torch.empty_like(mask)
        found[order] = n_of_m_mask(magnitude[order], keep, of, axis=0)
        return found & mask
