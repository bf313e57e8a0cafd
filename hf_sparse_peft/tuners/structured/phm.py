r"""`PHM`: matrices of parameterised hypercomplex multiplication."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ...utils.option_types import PositiveFloat, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Call, Tensors, times
from .matrices import Matrix

RULE = "phm_rule"


@register_part("phm")
@dataclass(frozen=True)
class PHM(Matrix):
    r""":math:`M^\top = \sum_{i=1}^n C_i \otimes (s_i t_i)` `[cols, rows]`, with C `[n, n, n]`, which all matrices of
    the adapter share, and low ranks :math:`s_i` `[cols / n, rank]`, :math:`t_i` `[rank, rows / n]` of each (Compacter;
    Karimi Mahabadi et al., 2021; official code rabeehk/compacter).

    `C` starts at N(0, rule_std^2), s and t Xavier-uniform with gain :math:`\sqrt 2`; a product never builds M.
    """

    n: PositiveInt = 4
    """Terms, and sides of each C; divides both sides of M."""
    rank: PositiveInt = 1
    """Of each :math:`s_i t_i`. (The released layer multiplies factors of a higher rank elementwise.)"""
    rule_std: PositiveFloat = 1e-4
    """Of C. The released configs have 1e-4 where it is shared, 0.01 where it is not."""
    shared_rule: bool = True
    """Whether C is one for all matrices, or each has its own."""
    tensor_names: ClassVar[tuple[str, ...]] = ("s", "t", "rule")
    common_names: ClassVar[tuple[str, ...]] = (RULE,)

    @property
    def shared(self) -> tuple[str, ...]:
        """C, if it is."""
        return self.common_names if self.shared_rule else ()

    def specs(self, role: str, rows: int, cols: int) -> list[TensorSpec]:
        """s `[n, cols / n, rank]` and t `[n, rank, rows / n]`, and C where it is not shared.

        Raises:
            ValueError: n does not divide a side.
        """
        if rows % self.n or cols % self.n:
            raise ValueError(f"PHM.n={self.n} does not divide the sides {rows} x {cols} of its matrix. Choose another.")

        def start(shape: tuple[int, int, int], generator: torch.Generator | None) -> Tensor:
            bound = math.sqrt(2 * 6 / (shape[1] + shape[2]))  # Xavier of each [i], gain sqrt(2)
            return torch.empty(shape).uniform_(-bound, bound, generator=generator)

        s, t = (self.n, cols // self.n, self.rank), (self.n, self.rank, rows // self.n)
        found = [
            TensorSpec(f"{role}_s", s, start=partial(start, s)),
            TensorSpec(f"{role}_t", t, start=partial(start, t)),
        ]
        return found if self.shared_rule else [*found, self._rule(f"{role}_rule")]

    def shared_specs(self) -> list[TensorSpec]:
        """C."""
        return [self._rule(RULE)] if self.shared_rule else []

    def _rule(self, name: str) -> TensorSpec:
        def start(generator: torch.Generator | None) -> Tensor:
            return torch.empty(self.n, self.n, self.n).normal_(0, self.rule_std, generator=generator)

        return TensorSpec(name, (self.n, self.n, self.n), start=start)

    def _parts(self, role: str, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        return tensors[RULE if self.shared_rule else f"{role}_rule"], tensors[f"{role}_s"], tensors[f"{role}_t"]

    def dense(self, role: str, rows: int, cols: int, tensors: Tensors) -> Tensor:
        """The sum of Kronecker products."""
        C, s, t = self._parts(role, tensors)
        return torch.einsum("iab,ipr,irq->apbq", C, s, t).reshape(cols, rows).t()

    def product(self, x: Tensor, role: str, rows: int, cols: int, tensors: Tensors, call: Call) -> Tensor:
        """Over s, over C, over t: the cost of a product with rank n `rank`."""
        C, s, t = (tensor.to(call.dtype) for tensor in self._parts(role, tensors))
        n, rank = self.n, self.rank
        inner = times(x.reshape(*x.shape[:-1], n, cols // n), s.transpose(1, 2).reshape(n * rank, cols // n))
        inner = torch.einsum("iab,...air->...bir", C, inner.view(*inner.shape[:-1], n, rank))
        found = times(inner.reshape(*inner.shape[:-2], n * rank), t.reshape(n * rank, rows // n).t())
        return found.reshape(*x.shape[:-1], rows)
