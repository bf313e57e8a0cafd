"""`CUR`: a weight by some of its own columns and rows, and a small matrix between them that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...ops.frozen_product import frozen_product
from ...sparsity import Statistic
from ...sparsity.cur import Greedy, cur, cur_rank
from ...utils.option_types import PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Form, Tensors
from .input_statistics import InputMoments
from .low_rank import linear_chain
from .product import factor_product


@register_part("cur")
@dataclass(frozen=True)
class CUR(Form):
    r"""CUR decomposition, :math:`W \approx C (U + \Delta U) R`: r columns and r rows of the weight as they are, chosen
    by the singular vectors of :math:`|W_{ij}| \, a_j`, and :math:`U = C^+ W R^+`; :math:`\Delta U` trains, from 0
    (CURing, 2025; :math:`a_j` is the root mean square of input feature j over all tokens, as in Wanda).

    r is the largest with :math:`r^2 + r(m + n) \le mn`, at most `max_rank`, unless `rank_pattern` says otherwise.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("columns", "core", "rows", "core_update")
    full_precision: ClassVar[frozenset[str]] = frozenset({"core"})

    max_rank: PositiveInt = 256
    """The largest number of rows and columns."""
    inputs: bool = True
    """Whether the sizes of the inputs count, for which data are read; False: the weight's alone."""
    greedy: Greedy = "deim"
    """How rows and columns are chosen by singular vectors: DEIM as published, or as the released code does it (see
    `sparsity.cur.greedy_indices`)."""
    trained: Literal["update", "core"] = "update"
    r"""What trains: :math:`\Delta U` beside a frozen U, which weight decay leaves alone, or U itself, as released."""
    examples: PositiveInt = 128
    """Examples that inputs are read from."""

    def own_rank(self, rows: int, cols: int) -> int:
        """As said above; 1 where not even that saves anything."""
        return max(1, min(cur_rank(rows, cols), self.max_rank))

    def specs(self, rows: int, cols: int, rank: int) -> list[TensorSpec]:
        """C, U and R, and the update of U."""
        update = self.trained == "update"
        found = [
            TensorSpec("columns", (rows, rank), role="saved"),
            TensorSpec("core", (rank, rank), role="saved" if update else "trained"),
            TensorSpec("rows", (rank, cols), role="saved"),
        ]
        return found + ([TensorSpec("core_update", (rank, rank))] if update else [])

    @property
    def statistic(self) -> Statistic | None:
        """Squares of the inputs."""
        return InputMoments(self.examples, full=False) if self.inputs else None

    @torch.no_grad()
    def start(
        self,
        weight: Tensor,
        rank: int,
        *,
        state: Tensors | None = None,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensors:
        """Columns and rows as they are, and the core between them."""
        scale = None if state is None else state["second"].sqrt()
        found = cur(weight, rank, scale, self.greedy)
        tensors = {"columns": weight[:, found.columns], "core": found.core, "rows": weight[found.rows]}
        return tensors | ({"core_update": torch.zeros_like(found.core)} if self.trained == "update" else {})

    def product(self, x: Tensor, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        r""":math:`((X R^\top) U^\top) C^\top`."""
        inner = factor_product(frozen_product(x, tensors["rows"], dtype), _core(tensors), dtype)
        return frozen_product(inner, tensors["columns"], dtype)

    def weight(self, tensors: Tensors) -> Tensor:
        """C U R."""
        core = _core(tensors)
        return tensors["columns"].to(core.dtype) @ core @ tensors["rows"].to(core.dtype)

    def modules(self, tensors: Tensors, bias: Tensor | None) -> nn.Module:
        """Three linear layers in a row: `rows`, `core`, and `columns` with the bias."""
        return linear_chain({"rows": tensors["rows"], "core": _core(tensors), "columns": tensors["columns"]}, bias)


def _core(tensors: Tensors) -> Tensor:
    update = tensors.get("core_update")
    return tensors["core"] if update is None else tensors["core"] + update
