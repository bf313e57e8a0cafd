"""`Form`: what stands in the place of a weight, and how it is computed from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...rules import UnitSpace
from ...sparsity import Statistic
from ...utils.parts import Part
from ...utils.tensors import TensorSpec

Tensors = dict[str, Tensor]
"""A layer's tensors by the names of the form's specs."""


@dataclass(frozen=True)
class Form(Part):
    r"""A form of a weight, :math:`W \approx F(\theta)` `[rows, cols]`, whose tensors :math:`\theta` replace it.

    A form declares its tensors (`specs`), computes them from a weight (`start`), and says its product and its dense
    weight. It holds no tensor itself:

        @register_part("scaled_sign")
        @dataclass(frozen=True)
        class ScaledSign(Form):
            tensor_names: ClassVar[tuple[str, ...]] = ("signs", "scale")

            def specs(self, rows, cols, rank):
                return [TensorSpec("signs", (rows, cols), torch.int8, "saved"), TensorSpec("scale", (rows, 1))]

            def start(self, weight, rank, *, state=None, bias=None, generator=None):
                return {"signs": weight.sign().to(torch.int8), "scale": weight.abs().mean(1, keepdim=True)}

            def weight(self, tensors):
                return tensors["signs"].to(tensors["scale"].dtype) * tensors["scale"]
    """

    part_kind: ClassVar[str] = "form"
    tensor_names: ClassVar[tuple[str, ...]] = ()
    """Names of all tensors that `specs` may have, under any options."""
    exact: ClassVar[bool] = False
    """Whether it is the weight itself at the start and shrinks while it trains (low rank + sparse): it is not asked
    then to save numbers at once."""

    reads_size: ClassVar[bool] = False
    """Whether its size is that of the weight's content (`size_of`), and neither a rank rule nor a pattern says it."""
    full_precision: ClassVar[frozenset[str]] = frozenset()
    """Names of frozen floats that stay fp32; others are held in the base's dtype."""
    unit_kinds: ClassVar[frozenset[str]] = frozenset()
    """Kinds of the units that `spaces` gives."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        NAMES.update(dict.fromkeys(cls.tensor_names))

    # Sizes

    def own_rank(self, rows: int, cols: int) -> int | None:
        """The form's own size on a weight of that shape, which replaces the rank rule; None: the rule decides."""
        return None

    def size_of(self, weight: Tensor) -> int:
        """The form's size on `weight` `[rows, cols]`, which may be on the meta device; asked where `reads_size`."""
        raise NotImplementedError

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """The tensors on a weight of that shape, of role "trained" (parameters, fp32) or "saved" (buffers)."""
        raise NotImplementedError

    def stored_numbers(self, rows: int, cols: int, rank: int) -> float:
        """Numbers that it stores in place of `rows * cols`; an integer of b bits counts as b/16."""
        return sum(_numbers(spec) for spec in self.specs(rows, cols, rank))

    # Start

    @property
    def statistic(self) -> Statistic | None:
        """What the start reads of the layer's inputs, in calibration; None: it starts from the weight alone."""
        return None

    def start(
        self,
        weight: Tensor,
        rank: int,
        *,
        state: Tensors | None = None,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensors:
        """The form of `weight`.

        Args:
            weight: `[rows, cols]`, fp32 or fp64, only read.
            rank: `own_rank`, or what the rank rule says.
            state: of `statistic`, where there is one; None where data says nothing about the layer.
            bias: the layer's, `[rows]`, in the weight's dtype, if it has one.
            generator: what is drawn is drawn from it.
        """
        raise NotImplementedError

    # Use

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`X F^\top` in `dtype`, `[..., rows]`, for `x` `[..., cols]`; here by the dense weight."""
        return x.to(dtype) @ self.weight(tensors).to(dtype).t()

    def weight(self, tensors: Tensors) -> Tensor:
        """F, dense `[rows, cols]`, in the tensors' dtype."""
        raise NotImplementedError

    def bias(self, tensors: Tensors, own: Tensor | None) -> Tensor | None:
        """The bias beside it; here the layer's `own`."""
        return own

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace]:
        """Unit spaces of the form in a layer, whose units rules move."""
        return []

    def modules(self, tensors: Tensors, bias: Tensor | None) -> nn.Module:
        """The form as torch's own modules, with the tensors' dtypes, to be run without this package.

        Raises:
            ValueError: it has no such form.
        """
        raise ValueError(
            f"{type(self).__name__} is no sequence of linear layers. Export its dense weight: merge_and_unload()."
        )


def check_columns(columns: Tensor, key: str, cols: int) -> None:
    """Raises `ValueError` where a file's number of columns, int32 `[1]`, is not the weight's."""
    if int(columns) != cols:
        raise ValueError(f"'{key}' is {int(columns)}, and the weight has {cols} columns. The file is damaged.")


NAMES: dict[str, None] = {}
"""Tensors of all forms that there are, in the order of their classes."""


@dataclass(frozen=True)
class PackedForm(Form):
    """A form that a trained adapter's form is packed into, and that no weight starts with."""

    made_of: ClassVar[str]
    """The form that is trained first."""
    made_by: ClassVar[str]
    """The model's method that packs it."""

    def own_rank(self, rows: int, cols: int) -> int:
        """Refused at injection.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} is made of a trained adapter: take {self.made_of}(), train it, and call "
            f"model.base_model.{self.made_by}()."
        )


def _numbers(spec: TensorSpec) -> float:
    count = torch.Size(spec.shape).numel()
    return count if spec.dtype.is_floating_point else count * torch.iinfo(spec.dtype).bits / 16
