r"""`FactorPair`: a low-rank update whose factors are made of structured matrices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...utils.option_types import Decay, PositiveFloat, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Additive, Call, Site, Tensors
from .matrices import MadeOfMatrices, Matrix, enter_roles
from .quantised import PackedMatrix
from .tensor_train import TensorTrain

enter_roles("a", "b")


@register_part("factor_pair")
@dataclass(frozen=True)
class FactorPair(MadeOfMatrices, Additive):
    r""":math:`\Delta W = s\,B A` with A `[r, in]` and B `[out, r]` of a `matrix`, s = `lora_alpha` / r. It leaves as a
    plain LoRA, exactly."""

    r: PositiveInt = 8
    """Rank."""
    lora_alpha: PositiveFloat = 16.0
    """s times r."""
    matrix: Matrix = field(default_factory=TensorTrain)
    """How both factors are made of numbers."""
    dropout: Decay = 0.0
    """Of the input, in training."""
    inner_dropout: Decay = 0.0
    """Of the r numbers between A and B, in training."""

    @torch.no_grad()
    def packed(self, tensors: Tensors, site: Site) -> tuple[FactorPair, Tensors]:
        """With packed matrices."""
        found = self.matrix.packed("a", self.r, site.cols, tensors)
        found |= self.matrix.packed("b", site.rows, self.r, tensors)
        return replace(self, matrix=PackedMatrix(self.matrix.bits)), found

    def specs(self, site: Site) -> list[TensorSpec]:
        """Both matrices, and at the owner what matrices share."""
        try:
            found = [*self.matrix.specs("a", self.r, site.cols), *self.matrix.specs("b", site.rows, self.r)]
        except ValueError as error:
            raise ValueError(f"'{site.name}' ({site.rows} x {site.cols}, r={self.r}): {error}") from error
        return found + (self.matrix.shared_specs() if site.owns else [])

    def update(self, x: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """Over A, over B."""
        x = F.dropout(x, self.dropout, call.training)
        inner = self.matrix.product(x, "a", self.r, call.site.cols, tensors, call)
        inner = F.dropout(inner, self.inner_dropout, call.training)
        return self.lora_alpha / self.r * self.matrix.product(inner, "b", call.site.rows, self.r, tensors, call)

    def weight(self, tensors: Tensors, site: Site) -> Tensor:
        """The product."""
        B, A = self.factors(tensors, site)
        return B @ A

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        """Both matrices, s in B."""
        A = self.matrix.dense("a", self.r, site.cols, tensors)
        return self.lora_alpha / self.r * self.matrix.dense("b", site.rows, self.r, tensors), A
