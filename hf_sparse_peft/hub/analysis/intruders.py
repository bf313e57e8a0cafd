r"""Intruder dimensions: leading singular vectors of an adapted weight that the base weight does not have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ...utils.tables import Table, table
from .merged_weights import adapted_linears, base_weight, merged_weight
from .module_picture import draw_modules


@dataclass(frozen=True)
class ModuleIntruders:
    """Leading left singular vectors of one adapted weight."""

    similarities: Tensor = field(repr=False)
    r"""`[k]`, fp32: :math:`\max_i |\langle u'_j, u_i \rangle|` over all left singular vectors of the base weight, by
    falling singular value of the adapted one."""
    intruders: int
    """How many of them lie below epsilon."""


@dataclass(frozen=True)
class IntruderReport:
    """Intruder dimensions of an adapter."""

    k: int
    """Leading singular vectors of each adapted weight that were looked at."""
    epsilon: float
    """Similarity below which one is an intruder."""
    modules: dict[str, ModuleIntruders] = field(repr=False)
    """By module name, in model order."""

    @property
    def total(self) -> int:
        """Intruders of all modules."""
        return sum(module.intruders for module in self.modules.values())

    def table(self) -> Table:
        """A line for each module and one for all; `str()` of it is aligned text."""
        rows = [(name, m.intruders, f"{float(m.similarities.min()):.3f}") for name, m in self.modules.items()]
        columns = ("module", "intruders", "smallest similarity")
        return table(columns, rows, totals=(f"{len(self.modules)} modules", self.total, ""))

    def draw(self, path: str | Path) -> Path:
        """A heat map of the counts, blocks over kinds of matrices; returns `path`."""
        counts = {name: module.intruders for name, module in self.modules.items()}
        title = f"{self.total} intruder dimensions (of the leading {self.k}, similarity < {self.epsilon:g})"
        return draw_modules(counts, path, title, "intruder dimensions", top=max(1, *counts.values()))


@torch.no_grad()
def intruder_dimensions(
    model: nn.Module, adapter_name: str = "default", k: int = 10, epsilon: float = 0.5
) -> IntruderReport:
    r"""Count the intruder dimensions of an adapter (Shuttleworth et al., 2024).

    With the singular value decompositions :math:`W = U \Sigma V^\top` of a base weight and
    :math:`W + \Delta W = U' \Sigma' V'^\top`, the vector :math:`u'_j`, :math:`j \le k` by falling singular value, is an
    intruder where :math:`\max_i |\langle u'_j, u_i \rangle| < \varepsilon` over all :math:`u_i`. Low-rank updates make
    some, full fine-tuning next to none, and they go with forgetting. The authors' released code has k = 10,
    epsilon = 0.5, left vectors and fp32, as here.

    Any adapter of linear layers, this package's and upstream's, on dense or quantised bases (dequantised to measure).
    Two full decompositions a module, on its device: minutes for matrices of several thousand rows on a CPU.

    Args:
        model: has the adapter, not merged.
        adapter_name: which.
        k: leading vectors of each adapted weight; where it has fewer, all of them.
        epsilon: the threshold, in (0, 1].

    Raises:
        ValueError: no such adapter, one that is merged, or a number out of range.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r} counts leading singular vectors; give an integer >= 1.")
    if not 0 < epsilon <= 1:
        raise ValueError(
            f"epsilon={epsilon} is the similarity below which a vector is an intruder; give one in (0, 1]."
        )
    found = {}
    for name, layer in adapted_linears(model, adapter_name).items():
        similarities = similarity_to_base(base_weight(layer), merged_weight(layer, [adapter_name]), k)
        found[name] = ModuleIntruders(similarities.cpu(), int((similarities < epsilon).sum()))
    return IntruderReport(k, epsilon, found)


def similarity_to_base(base: Tensor, adapted: Tensor, k: int) -> Tensor:
    """`[min(k, side)]`: the largest |cosine| of each of the `k` leading left singular vectors of `adapted` `[out, in]`
    with those of `base`, any of them."""
    U = torch.linalg.svd(base, full_matrices=False).U
    leading = torch.linalg.svd(adapted, full_matrices=False).U[:, :k]
    return (leading.T @ U).abs().amax(1)
