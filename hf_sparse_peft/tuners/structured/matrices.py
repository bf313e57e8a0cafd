r"""Matrices: how the trained matrices inside of forms are made of numbers, :math:`M(\theta)` `[rows, cols]`.

matrices.py      Matrix, what all say of themselves; DenseMatrix, the numbers themselves
phm.py           PHM: sums of Kronecker products of a shared small matrix and a low rank
tensor_train.py  TensorTrain: a chain of small cores
quantised.py     Quantised: a few values, of numbers that train; PackedMatrix, what it is shipped as
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...ops import autocast_off
from ...utils.option_types import PositiveFloat
from ...utils.parts import Part, register_part
from ...utils.tensors import TensorSpec
from .form import Call, Site, Tensors, enter_names, times

ROLES: dict[str, None] = {}
"""Names of the matrices that forms have: "down", "up", ..."""
SUFFIXES: dict[str, None] = {}
"""Names of the tensors that matrices are made of."""


def enter_roles(*roles: str) -> None:
    """Enter names of the matrices of a form, so that files may hold their tensors."""
    ROLES.update(dict.fromkeys(roles))
    enter_names(f"{role}_{suffix}" for role in ROLES for suffix in SUFFIXES)


@dataclass(frozen=True)
class Matrix(Part):
    """How a matrix is made of trained tensors. A form has several, each in a role ("down", "up") that its tensors'
    names begin with.

    Register one of your own with `register_part`; it names its tensors in `tensor_names` (and in `common_names` those
    that all matrices of an adapter have in common), declares them (`specs`) and gives the matrix (`dense`).
    """

    part_kind: ClassVar[str] = "matrix"
    tensor_names: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors, without the role."""
    common_names: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that all matrices of an adapter may share, in all modules."""
    made_by: ClassVar[str | None] = None
    """The model's method that makes such matrices of trained ones; None: they are made at injection."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        SUFFIXES.update(dict.fromkeys(cls.tensor_names))
        enter_roles()
        enter_names(cls.common_names)

    @property
    def shared(self) -> tuple[str, ...]:
        """Those that they do."""
        return self.common_names

    def specs(self, role: str, rows: int, cols: int) -> list[TensorSpec]:
        """The tensors of a matrix `[rows, cols]` in that role, named `{role}_{name}`.

        Raises:
            ValueError: the sides do not fit.
        """
        raise NotImplementedError

    def shared_specs(self) -> list[TensorSpec]:
        """The tensors in `shared`."""
        return []

    def dense(self, role: str, rows: int, cols: int, tensors: Tensors) -> Tensor:
        """M, `[rows, cols]`, in the tensors' dtype."""
        raise NotImplementedError

    def packed(self, role: str, rows: int, cols: int, tensors: Tensors) -> Tensors:
        """Tensors of `PackedMatrix`, of the same matrix to the bit.

        Raises:
            ValueError: it is no matrix of a few values.
        """
        raise ValueError(f"{type(self).__name__} is no matrix of a few values; Quantised is.")

    def product(self, x: Tensor, role: str, rows: int, cols: int, tensors: Tensors, call: Call) -> Tensor:
        r""":math:`X M^\top` `[..., rows]` in `call.dtype`, for `x` `[..., cols]` in it."""
        with autocast_off(x.device.type):  # chains and means are made in fp32
            matrix = self.dense(role, rows, cols, tensors)
        return times(x, matrix.to(call.dtype))


@register_part("dense")
@dataclass(frozen=True)
class DenseMatrix(Matrix):
    """The numbers themselves."""

    init: Literal["truncated", "normal", "kaiming", "xavier", "zeros"] = "truncated"
    """`truncated`: N(0, std^2) cut at two std; `normal`: N(0, std^2); `kaiming`: U(-1, 1) / sqrt(cols)."""
    std: PositiveFloat = 1e-3
    """Of `truncated` and `normal`."""
    tensor_names: ClassVar[tuple[str, ...]] = ("matrix",)

    def specs(self, role: str, rows: int, cols: int) -> list[TensorSpec]:
        """`[rows, cols]`."""

        def start(generator: torch.Generator | None) -> Tensor:
            found = torch.empty(rows, cols)
            if self.init == "truncated":
                bound = 2 * self.std
                return nn.init.trunc_normal_(found, std=self.std, a=-bound, b=bound, generator=generator)
            if self.init == "normal":
                return found.normal_(0, self.std, generator=generator)
            if self.init == "xavier":
                return nn.init.xavier_uniform_(found, generator=generator)
            return nn.init.kaiming_uniform_(found, math.sqrt(5), generator=generator)

        return [TensorSpec(f"{role}_matrix", (rows, cols), start=None if self.init == "zeros" else start)]

    def dense(self, role: str, rows: int, cols: int, tensors: Tensors) -> Tensor:
        """The parameter itself."""
        return tensors[f"{role}_matrix"]


class MadeOfMatrices:
    """For a form whose tensors are those of its `matrix`; before the form's kind among the bases."""

    matrix: Matrix

    @property
    def shared(self) -> tuple[str, ...]:
        """Those of the matrix."""
        return self.matrix.shared

    def group(self, site: Site) -> Hashable:
        """All modules."""
        return ""

    @property
    def made_by(self) -> str | None:
        """That of the matrix."""
        return self.matrix.made_by
